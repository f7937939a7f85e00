"""The denoiser's tensors in several files: the same artifact, whatever the size of a shard."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from errata import deploy
from errata.compress import CompressedPipeline
from errata.deploy.sharding import size_in_bytes, split
from errata.errors import ArtifactError

Artifact = Callable[[str], Path]
SHARD = 8_000


@pytest.fixture(scope="module")
def sharded(
    tiny_compressed: Callable[[str], CompressedPipeline], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "artifact"
    return deploy.export(tiny_compressed("w4a8"), out, max_shard_size=SHARD)


def shards_of(root: Path) -> list[Path]:
    return sorted((root / "unet").glob("*.safetensors"))


def images(path: Path) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    made = deploy.load(path, backend="reference")(batch_size=2, generator=generator, output_type="pt").images
    return torch.as_tensor(made)


def test_a_small_model_keeps_one_file_with_the_same_bytes(
    tiny_compressed: Callable[[str], CompressedPipeline], tiny_artifact: Artifact, tmp_path: Path
) -> None:
    again = deploy.export(tiny_compressed("w4a8"), tmp_path / "artifact", max_shard_size="1MB")
    name = "unet/errata.safetensors"
    assert (again / name).read_bytes() == (tiny_artifact("w4a8") / name).read_bytes()
    assert (again / "errata.json").read_bytes() == (tiny_artifact("w4a8") / "errata.json").read_bytes()


def test_shards_hold_each_tensor_once(sharded: Path, tiny_artifact: Artifact) -> None:
    files = shards_of(sharded)
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [
        f"errata-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    whole = load_file(tiny_artifact("w4a8") / "unet/errata.safetensors")
    found = [item for file in files for item in load_file(file).items()]
    assert sorted(name for name, _ in found) == sorted(whole)
    assert all(torch.equal(value, whole[name]) for name, value in found)
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= SHARD


def test_no_index_is_written_but_the_manifest(sharded: Path) -> None:
    files = {path.relative_to(sharded).as_posix() for path in sharded.rglob("*") if path.is_file()}
    assert files - {"errata.json"} == set(deploy.verify(sharded).files)
    assert not [name for name in files if "index" in name and name != "model_index.json"]


def test_a_sharded_artifact_samples_the_same(sharded: Path, tiny_artifact: Artifact) -> None:
    assert torch.equal(images(sharded), images(tiny_artifact("w4a8")))


def test_shards_have_the_same_bytes_each_time(
    sharded: Path, tiny_compressed: Callable[[str], CompressedPipeline], tmp_path: Path
) -> None:
    again = deploy.export(tiny_compressed("w4a8"), tmp_path / "again", max_shard_size=SHARD)
    assert [file.read_bytes() for file in shards_of(again)] == [
        file.read_bytes() for file in shards_of(sharded)
    ]
    assert (again / "errata.json").read_bytes() == (sharded / "errata.json").read_bytes()


def test_a_lost_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sharded, tmp_path / "artifact"))
    shards_of(root)[1].unlink()
    with pytest.raises(ArtifactError, match=r"errata-00002-of-\d{5}.safetensors is missing"):
        deploy.verify(root)


def test_a_tensor_above_the_limit_has_a_shard_to_itself() -> None:
    tensors = {
        name: torch.zeros(size, dtype=torch.uint8) for name, size in zip("abcd", (3, 9, 2, 2), strict=True)
    }
    assert [list(shard) for shard in split(tensors, max_shard_size=4)] == [["a"], ["b"], ["c", "d"]]
    assert [list(shard) for shard in split(tensors, max_shard_size=16)] == [list("abcd")]
    assert split({}, max_shard_size=1) == [{}]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("7B", 7), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("500MiB", 500 * 2**20), ("2KB", 2000)],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert size_in_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -1, True, "0GB", "5", "many", "-5GB", "5.5GB", ""])
def test_what_is_no_size(
    size: int | str, tiny_compressed: Callable[[str], CompressedPipeline], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="max_shard_size=.*; allowed are a number of bytes above zero"):
        deploy.export(tiny_compressed("w4a8"), tmp_path / "out", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_headers_of_shards_name_no_file(sharded: Path) -> None:
    for file in shards_of(sharded):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() is None

"""Engines compute what their artifact computes, are corrected like it, and are refused where damaged."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifact_files import change_tensors
from tiny import compressed_by_name, exported_by_name, tiny_ddim
from torch import Tensor

from errata import calibration, cli, correct, deploy
from errata.correct import IEC, Forecast, Plan
from errata.deploy import DeployedPipeline
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactMismatchError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from errata.deploy import engines
from errata.deploy.engines.onnx_graphs import CACHED, FULL

Artifact = Callable[[str], Path]
Engine = Callable[..., Path]
RECIPES = ["w6a8", "w4a8+deepcache-2:branch=1", "w8a8+cachequant-2", "deepcache-3"]
STEPS = 6
# Of the best quarter of the samples, which meet no code on a tie; a wrong step is 0.06 away and more.
BOUND = 2e-5


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`small_artifact("w8a8")`: as `tiny_artifact`, with one layer a block: exporting a graph takes long."""
    root, pipeline = tmp_path_factory.mktemp("small"), tiny_ddim(layers_per_block=1)
    recorded = calibration.collect(
        pipeline, root / "set", num_inference_steps=STEPS, num_samples=8, batch_size=4
    )
    return exported_by_name(
        compressed_by_name(pipeline, recorded, root), tmp_path_factory.mktemp("small_artifacts")
    )


@pytest.fixture(scope="session")
def small_engine(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """`small_engine("w8a8", "qdq")`: that artifact exported in that form, once a session."""
    root = tmp_path_factory.mktemp("engines")

    @functools.cache
    def export(recipe: str, form: str) -> Path:
        out = root / f"{recipe.replace(':', '_')}-{form}"
        return engines.export_onnx(small_artifact(recipe), out, form=form)

    def make(recipe: str, form: str = "gathered") -> Path:
        return export(recipe, form)

    return make


@pytest.fixture
def copied(small_engine: Engine, tmp_path: Path) -> Path:
    """A W8A8 engine with a cache, free to be damaged."""
    return Path(shutil.copytree(small_engine("w4a8+deepcache-2:branch=1"), tmp_path / "engine"))


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference to that of `expected`, of each sample, and their lower quartile."""
    away = (found - expected).flatten(1).square().mean(dim=1).sqrt()
    return float((away / expected.flatten(1).square().mean(dim=1).sqrt()).quantile(0.25))


def images(pipeline: object, batch_size: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    output = pipeline(batch_size=batch_size, generator=generator, output_type="np")  # type: ignore[operator]
    return torch.as_tensor(output.images)


@pytest.mark.parametrize("form", ["gathered", "qdq"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_engine_computes_what_its_artifact_computes_at_every_step(
    recipe: str, form: str, small_artifact: Artifact, small_engine: Engine
) -> None:
    reference = deploy.load(small_artifact(recipe), backend="reference").denoiser
    engine = deploy.load(small_engine(recipe, form)).denoiser
    for batch_size, step in ((32, 0), (33, 1), (34, 2), (35, 3), (36, 4), (37, 5)):
        x = torch.randn(batch_size, 1, 8, 8)
        expected, feature = reference.full(x, step, {})
        found, found_feature = engine.full(x, step, {})
        assert distance(found, expected) <= BOUND
        other = engine.full(x, (step + 3) % STEPS, {})[0]
        assert distance(other, expected) > 1000 * BOUND  # a wrong step's scales and time
        assert (feature is None) == (found_feature is None)
        if feature is None or found_feature is None:
            continue
        assert distance(found_feature, feature) <= BOUND
        for is_extrapolated in (False, True):
            expected = reference.cached(x, step, {}, feature, is_extrapolated=is_extrapolated)
            found = engine.cached(x, step, {}, feature, is_extrapolated=is_extrapolated)
            assert distance(found, expected) <= BOUND
            elsewhere = engine.cached(x, step, {}, feature.flip(0) + 1, is_extrapolated=is_extrapolated)
            assert distance(elsewhere, expected) > 1000 * BOUND  # the feature is read


def test_runs_through_an_engine_are_those_of_its_artifact(
    small_artifact: Artifact, small_engine: Engine
) -> None:
    recipe = "deepcache-3"
    expected, found = images(deploy.load(small_artifact(recipe))), images(deploy.load(small_engine(recipe)))
    assert (found - expected).abs().max() <= 1e-4
    assert (found - images(deploy.load(small_engine("w6a8")))).abs().max() > 1e-3


@pytest.mark.parametrize(
    "plan", [Plan(IEC(), "full"), Plan(Forecast(order=1), "all")], ids=["iec", "forecast"]
)
def test_an_engine_is_corrected_like_its_artifact(
    plan: Plan, small_artifact: Artifact, small_engine: Engine
) -> None:
    recipe = "deepcache-3"
    artifact = correct.wrap(deploy.load(small_artifact(recipe)), plan)
    engine = correct.wrap(deploy.load(small_engine(recipe)), plan)
    expected, found = images(artifact), images(engine)
    assert (found - expected).abs().max() <= 1e-4
    assert (found - images(engine.deployed)).abs().max() > 1e-3
    assert engine.stats.evaluations == artifact.stats.evaluations


def test_every_layer_runs_in_the_engine(small_engine: Engine) -> None:
    rows = deploy.load(small_engine("w8a8+cachequant-2")).backend_report()
    assert {row.backend for row in rows} == {"onnxruntime int8", "onnxruntime float"}
    products = engine_operators(small_engine("w8a8+cachequant-2") / FULL).count("MatMulIntegerToFloat")
    # a concatenated input has two products, so there are more products than layers
    assert products >= sum(row.backend == "onnxruntime int8" for row in rows) > 10


def test_the_portable_form_has_constant_scales_and_no_operator_but_onnx_s_own(small_engine: Engine) -> None:
    import onnx

    graph = onnx.load(str(small_engine("w8a8+cachequant-2", "qdq") / FULL)).graph
    assert {node.domain for node in graph.node} == {""}
    made_by = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) > 10
    assert all(
        name in constants or made_by[name].op_type == "Constant" for node in pairs for name in node.input[1:]
    )
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    quantized = [node for node in convolutions if made_by[node.input[0]].op_type == "DequantizeLinear"]
    assert len(quantized) > 10
    assert all(made_by[node.input[1]].op_type == "DequantizeLinear" for node in quantized)
    assert all(
        set(attribute.ints) == {0}
        for node in quantized
        for attribute in node.attribute
        if attribute.name == "pads"
    )


def test_an_unknown_form_is_refused(small_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="unknown form 'int8'; allowed are gathered and qdq"):
        engines.export_onnx(small_artifact("w6a8"), tmp_path / "engine", form="int8")


def engine_operators(file: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(str(file)).graph.node]


def test_the_same_artifact_gives_the_same_engine(
    small_artifact: Artifact, small_engine: Engine, tmp_path: Path
) -> None:
    again = engines.export_onnx(small_artifact("w6a8"), tmp_path / "again")
    assert (again / engines.ENGINE_FILE).read_bytes() == (
        small_engine("w6a8") / engines.ENGINE_FILE
    ).read_bytes()


def test_other_sizes_and_conditions_are_refused(small_engine: Engine) -> None:
    engine: DeployedPipeline = deploy.load(small_engine("w6a8"))
    with pytest.raises(
        ArtifactMismatchError, match=r"takes 'sample' as \[None, 1, 8, 8\].*got \[2, 1, 16, 16\]"
    ):
        engine.denoiser.full(torch.randn(2, 1, 16, 16), 0, {})
    with pytest.raises(ArtifactMismatchError, match="does not take the input 'class_labels'"):
        engine.denoiser.full(torch.randn(2, 1, 8, 8), 0, {"class_labels": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="step 6 was not recorded"):
        engine.denoiser.full(torch.randn(2, 1, 8, 8), STEPS, {})
    with pytest.raises(ArtifactMismatchError, match="num_inference_steps"):
        engine.at_steps(3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cuda"}, "device='cuda'"),
        ({"backend": "onednn"}, "backend='onednn'"),
        ({"on_mismatch": "nearest"}, "on_mismatch='nearest'"),
    ],
)
def test_what_an_engine_does_not_have_is_refused(
    arguments: dict[str, str], words: str, small_engine: Engine
) -> None:
    with pytest.raises(ArtifactError, match=f"{words}.*is an engine"):
        deploy.load(small_engine("w6a8"), **arguments)  # type: ignore[arg-type]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda root: flip(root / FULL), "full.onnx"),
        (lambda root: (root / CACHED).unlink(), "cached.onnx"),
        (lambda root: (root / "more.onnx").write_bytes(b"x"), "more.onnx.*not listed"),
        (lambda root: flip(root / engines.ENGINE_FILE), "errata-engine.json"),
        (lambda root: flip(root / "scheduler" / "scheduler_config.json"), "scheduler_config.json"),
    ],
    ids=["graph", "missing", "extra", "manifest", "scheduler"],
)
def test_a_damaged_engine_is_refused(harm: Callable[[Path], object], words: str, copied: Path) -> None:
    engines.verify(copied)
    harm(copied)
    with pytest.raises(ArtifactCorruptError, match=words):
        deploy.load(copied)


def reseal(root: Path, change: Callable[[object], None]) -> None:
    """Changes the full graph and writes a manifest that says so: what a forger would do."""
    import dataclasses

    import onnx

    from errata.canonical_json import file_digest
    from errata.deploy.engines.manifest import read_engine_manifest
    from errata.deploy.manifest import FileRecord

    model = onnx.load(str(root / FULL))
    change(model)
    (root / FULL).write_bytes(model.SerializeToString())
    manifest = read_engine_manifest(root)
    record = FileRecord(bytes=(root / FULL).stat().st_size, sha256=file_digest(root / FULL))
    dataclasses.replace(manifest, files={**manifest.files, FULL: record}).write(root)


def foreign_node(model: object) -> None:
    model.graph.node[0].domain = "com.microsoft"  # type: ignore[attr-defined]
    model.graph.node[0].op_type = "EPContext"  # type: ignore[attr-defined]


def outside_data(model: object) -> None:
    tensor = model.graph.initializer[0]  # type: ignore[attr-defined]
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="../../secret")


def other_input(model: object) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16  # type: ignore[attr-defined]


def own_domain(model: object) -> None:
    model.opset_import.add(domain="evil", version=1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (foreign_node, "node 'EPContext' of 'com.microsoft'"),
        (outside_data, "in another file"),
        (other_input, "the manifest says"),
        (own_domain, "imports operators of 'evil'"),
    ],
)
def test_a_forged_graph_is_refused(change: Callable[[object], None], words: str, copied: Path) -> None:
    reseal(copied, lambda model: None)
    engines.verify(copied)  # a resealed manifest alone is no reason to refuse
    reseal(copied, change)
    with pytest.raises(ArtifactCorruptError, match=words):
        engines.verify(copied)


def test_an_engine_that_disagrees_is_not_written(
    small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "errata.deploy.engines.loading.EngineDenoiser._inputs",
        lambda self, x, step, cond: {"sample": x, "step": torch.tensor((step + 3) % STEPS), **cond},
    )
    with pytest.raises(ArtifactError, match="full prediction at step 0"):
        engines.export_onnx(small_artifact("w6a8"), tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_exports_verifies_inspects_and_generates(
    small_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    assert cli.main(["export", str(small_artifact("deepcache-3")), "--out", str(engine)]) == 0
    assert "cached.onnx and full.onnx" in capsys.readouterr().out
    assert cli.main(["verify", str(engine)]) == 0
    assert cli.main(["inspect", str(engine)]) == 0
    assert "sample[B,1,8,8] step[] feature[B," in capsys.readouterr().out
    made = ["generate", str(engine), "--images", "2", "--correct", "iec", "--at", "full"]
    assert cli.main([*made, "--out", str(tmp_path / "images")]) == 0
    assert (tmp_path / "images" / "00001.png").exists()
    assert cli.main(["export", str(engine), "--out", str(tmp_path / "again")]) == 1
    assert "errata.json" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["gathered", "qdq"])
def test_a_calibrated_output_is_part_of_the_graphs(
    form: str, small_artifact: Artifact, tmp_path: Path
) -> None:
    """An engine without it would be refused at the export: it is compared with the artifact there."""
    path = Path(shutil.copytree(small_artifact("w8a8+cachequant-2"), tmp_path / "artifact"))
    matrix, bias = 1 + 0.1 * torch.arange(STEPS).view(-1, 1, 1), 0.1 * torch.arange(STEPS).view(-1, 1)
    change_tensors(path, lambda tensors: tensors.update({"output.matrix": matrix, "output.bias": bias}))
    artifact = deploy.load(path, backend="reference").denoiser
    engine = deploy.load(engines.export_onnx(path, tmp_path / "engine", form=form)).denoiser
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in (0, 3, STEPS - 1):
        expected, feature = artifact.full(x, step, {})
        found, _ = engine.full(x, step, {})
        assert feature is not None
        pairs = [(found, expected)]
        if step:
            pairs.append((engine.cached(x, step, {}, feature), artifact.cached(x, step, {}, feature)))
        for ours, theirs in pairs:
            error = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
            assert float(error.quantile(0.25)) < BOUND

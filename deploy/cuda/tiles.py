"""Block sizes of the int8 product."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from errata.deploy.cuda.weights import GROUP


@dataclass(frozen=True)
class Tile:
    """Rows, output channels and channels that one block takes; its warps, and stages of the pipeline."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int

    def numbers(self, *, is_int4: bool) -> list[int]:
        """Return what `operators.int8_product` takes; int4 weights come in groups of a fixed size."""
        rows, columns, channels, warps, stages = astuple(self)
        return [rows, columns, GROUP if is_int4 else channels, warps, stages]


# Few, because every shape is measured with each: one for large products, one where those leave most of the
# device idle, one for few rows. 16 rows and 32 channels are the least that int8 tensor cores take.
TILES = {
    "triton 128x128": Tile(128, 128, 64, 8, 3),
    "triton 64x64": Tile(64, 64, 64, 4, 4),
    "triton 16x64": Tile(16, 64, 128, 4, 4),
}
# Blocks below which the larger tile cannot occupy a device: an A100 has 108 multiprocessors, an H100 132.
_ENOUGH_BLOCKS = 128


def tile_for(rows: int, columns: int) -> str:
    """Name of the tile to take where nothing was measured."""
    for name, tile in TILES.items():
        blocks = -(-rows // tile.rows) * -(-columns // tile.columns)
        if rows > tile.rows // 2 and blocks >= _ENOUGH_BLOCKS:
            return name
    return "triton 16x64" if rows <= TILES["triton 16x64"].rows else "triton 64x64"

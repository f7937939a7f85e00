/* The tiles of AMX: how they are set up, and what gcc has to be told of them. */

#ifndef ERRATA_TILES_H
#define ERRATA_TILES_H

#include <immintrin.h>
#include <stdint.h>

#define ROWS 16      /* of a tile */
#define ROW_BYTES 64 /* of a tile, at most */

/* Makes the compiler finish what was written before: to gcc 12, instructions that load tiles, or their set-up, read
 * no memory. */
#define WRITTEN(address) __asm__ volatile("" : : "r"(address) : "memory")

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) TileConfiguration;

/* Tiles 0 to 3 hold sums, 4 and 5 rows of `bytes`, 6 and 7 what these are multiplied by: a row for four bytes. */
static inline void configure_tiles(int64_t bytes)
{
    TileConfiguration tiles = { .palette = 1 };
    for (int tile = 0; tile < 8; tile++) {
        tiles.rows[tile] = tile < 6 ? ROWS : (uint8_t)(bytes / 4);
        tiles.row_bytes[tile] = tile == 4 || tile == 5 ? (uint16_t)bytes : ROW_BYTES;
    }
    WRITTEN(&tiles);
    _tile_loadconfig(&tiles);
}

#endif

#!/usr/bin/env bash
# gcc 12.2's _tile_loadconfig() (AMX, <immintrin.h>) tells the optimizer that it reads the first 8 of the 64 bytes
# that the instruction reads. From -O2 on, what was written to the other 56 bytes of a local configuration may be
# dropped: here the row sizes of all tiles. The program compiles without a warning and runs with tiles of
# whatever size the stack held. At -O0 and -O1 the stores are there.
#
# It matters to whoever writes kernels with AMX tiles: put `__asm__ volatile("" : : "r"(&tiles) : "memory")` between
# the last store and _tile_loadconfig(). The same holds for stores before _tile_loadd(), which is told to read none.
#
# Seen with Debian's cpp-12 12.2.0-14+deb12u1 on Linux x86_64, 2026-11-30; nothing is run that needs AMX.
# Exits with 0 while that holds, and with 1 when it does not.
set -euo pipefail
version=12.2.0-14+deb12u1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"
cd "$folder"
apt-get download -qq "cpp-12=$version" "libgcc-12-dev=$version" \
    libc6-dev linux-libc-dev libisl23 libmpc3 libmpfr6 libgmp10 2>/dev/null
for package in *.deb; do dpkg -x "$package" root; done
system=$folder/root/usr
export LD_LIBRARY_PATH="$system/lib/x86_64-linux-gnu"

cat >tiles.c <<'C'
#include <immintrin.h>

struct configuration {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
};

void set_up(void)
{
    struct configuration tiles = { 1 };
    for (int tile = 0; tile < 8; tile++) {
        tiles.row_bytes[tile] = 64;
        tiles.rows[tile] = 16;
    }
    BARRIER;
    _tile_loadconfig(&tiles);
}
C

stores_of() { # what stands in place of BARRIER: how many stores to the stack precede ldtilecfg
    "$system/lib/gcc/x86_64-linux-gnu/12/cc1" -quiet -O2 -mamx-tile -D "BARRIER=$1" tiles.c -o tiles.s \
        -nostdinc -isystem "$system/lib/gcc/x86_64-linux-gnu/12/include" -isystem "$system/include" \
        -isystem "$system/include/x86_64-linux-gnu"
    sed '/ldtilecfg/q' tiles.s | grep -cE 'mov[a-z]+[[:space:]].*,[[:space:]]*-?[0-9]*\(%rsp\)$'
}

holds_sizes() { # whether the constant 64, the size of a row, is anywhere in the code
    grep -qE '(\.value[[:space:]]+|\$)64$|(\.value[[:space:]]+|\$)64,' tiles.s && echo yes || echo no
}

plain=$(stores_of '(void)0')
plain_sizes=$(holds_sizes)
told=$(stores_of '__asm__ volatile("" : : "r"(&tiles) : "memory")')
told_sizes=$(holds_sizes)
echo "gcc $version, -O2: $plain stores before ldtilecfg, row sizes among them: $plain_sizes;" \
    "with a barrier $told stores, row sizes: $told_sizes"
[[ $plain -lt $told && $plain_sizes == no && $told_sizes == yes ]]

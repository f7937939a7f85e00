#!/usr/bin/env bash
# gcc 12.2 for aarch64 keeps sums of an unrolled NEON kernel on the stack at -O3, although they fit the 32
# vector registers: its scheduling before registers are given out, which is off on x86, moves the products so far
# apart that no register is left. With -fno-schedule-insns the same intrinsics need a quarter of the accesses.
#
# It matters to whoever writes matrix products in NEON intrinsics, most of all with vmull_s8 and vpadalq_s16, where
# every product needs a register of its own: count the accesses, and add the option for such a file.
#
# Seen with Debian's cpp-12-aarch64-linux-gnu 12.2.0-14cross1 on Linux x86_64, 2026-12-01: 137 loads and stores of
# vector registers on the stack at -O3, 31 with the option. Nothing is run: times are not known.
# Exits with 0 while that holds, and with 1 when it does not.
set -euo pipefail
version=12.2.0-14cross1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"
cd "$folder"
apt-get download -qq "cpp-12-aarch64-linux-gnu=$version" "libgcc-12-dev-arm64-cross=$version" libc6-dev-arm64-cross \
    linux-libc-dev-arm64-cross libisl23 libmpc3 libmpfr6 libgmp10 2>/dev/null
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu"
compiler=$folder/root/usr/lib/gcc-cross/aarch64-linux-gnu/12/cc1

cat >tile.c <<'C'
#include <arm_neon.h>

#define PIXELS 4
#define PARTS 4

void multiply(const int8_t *const *rows, int64_t channels, const int8_t *weights, int32_t *out)
{
    int32x4_t sums[PIXELS][PARTS];
    for (int p = 0; p < PIXELS; p++)
        for (int part = 0; part < PARTS; part++)
            sums[p][part] = vdupq_n_s32(0);
    for (int64_t c = 0; c < channels; c += 16) {
        int8x16_t codes[PIXELS];
        for (int p = 0; p < PIXELS; p++)
            codes[p] = vld1q_s8(rows[p] + c);
#pragma GCC unroll 4
        for (int group = 0; group < 4; group++, weights += 64)
            for (int part = 0; part < PARTS; part++) {
                int8x16_t weight = vld1q_s8(weights + 16 * part);
                for (int p = 0; p < PIXELS; p++) {
                    int32_t four = vreinterpretq_s32_s8(codes[p])[group];
                    int8x16_t code = vreinterpretq_s8_s32(vdupq_n_s32(four));
                    int16x8_t low = vmull_s8(vget_low_s8(weight), vget_low_s8(code));
                    int16x8_t high = vmull_high_s8(weight, code);
                    sums[p][part] = vpadalq_s16(sums[p][part], vpaddq_s16(low, high));
                }
            }
    }
    for (int p = 0; p < PIXELS; p++)
        for (int part = 0; part < PARTS; part++)
            vst1q_s32(out + 16 * p + 4 * part, sums[p][part]);
}
C

# Loads and stores of vector registers at addresses from the stack pointer.
accesses() {
    "$compiler" -quiet -O3 -march=armv8-a "$@" -isystem "$include" -isystem "$libc" tile.c -o tile.s
    grep -cE '(str|stp|ldr|ldp)\s+q.*\[sp' tile.s
}
include=$folder/root/usr/lib/gcc-cross/aarch64-linux-gnu/12/include
libc=$folder/root/usr/aarch64-linux-gnu/include
usual=$(accesses)
without=$(accesses -fno-schedule-insns)
echo "gcc $version, -O3: $usual accesses to the stack; with -fno-schedule-insns: $without"
[[ $usual -ge $((3 * without)) && $usual -gt 60 ]]

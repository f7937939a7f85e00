#!/bin/sh
# The kernel tests on C code that is compiled with AddressSanitizer and UndefinedBehaviorSanitizer. A compiler
# without them is told, and nothing is tested. Vector loads and stores with masks, and those of tiles, are
# instructions that the sanitizers do not see: a wrong address there has to show in results.
set -eu
cd "$(dirname "$0")/.."
compiler=${CC:-$(command -v cc || command -v gcc || true)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "$compiler" ] || ! echo 'int main(void) { return 0; }' |
    "$compiler" -fsanitize=address,undefined -x c -o "$work/probe" - 2>"$work/reason"; then
    echo "not sanitized: no compiler with AddressSanitizer and UndefinedBehaviorSanitizer" >&2
    exit 0
fi
cat >"$work/cc" <<END
#!/bin/sh
exec "$compiler" -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer "\$@"
END
chmod +x "$work/cc"
# Python itself is not sanitized: the runtime has to be there before the library, and Python's leaks are its own.
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 CC="$work/cc" ERRATA_CACHE="$work/cache"
# Builds for other CPUs are left out: to compile each takes as long as all tests.
# Without this, tests of code that did not compile would be skipped.
.venv/bin/python -c 'from errata.deploy.cpu import native; raise SystemExit(native.obstacle() or None)'
.venv/bin/python -m pytest -q -n 0 -p no:cacheprovider \
    tests/deploy/cpu/test_attention.py tests/deploy/cpu/test_int8.py tests/deploy/cpu/test_norms.py \
    tests/deploy/cpu/test_program.py -k "not avx2 and not avxvnni and not avx512"

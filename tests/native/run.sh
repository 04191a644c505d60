#!/usr/bin/env bash
# The C library under sanitizers, with the least work shared out and most of it waking helpers: see team.c, memory.c.
set -euo pipefail
cd "$(dirname "$0")/../.."
CC=${CC:-cc}
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
flags="-O0 -g1 -std=gnu11 -ffp-contract=off -pthread -Ineoquant/native -DNQ_WORTH_A_THREAD=1 -DNQ_WORTH_WAKING=3000 -DNQ_LONG=6000"
address="-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-sanitize=float-divide-by-zero"

build() {  # build NAME FLAGS...: the library's objects, as many at a time as there are cores
    local name=$1; shift
    mkdir "$built/$name"
    printf '%s\n' neoquant/native/*.c | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I{} sh -c \
        '"$@" -c "$0" -o "'"$built/$name"'/$(basename "$0").o"' {} "$CC" $flags "$@"
}

run() {  # run DRIVER BUILD FLAGS...
    local driver=$1 name=$2; shift 2
    "$CC" $flags "$@" -o "$built/$driver-$name" "tests/native/$driver.c" "$built/$name"/*.o -lm
    echo "$driver, $name:"
    "$built/$driver-$name"
}

build thread -fsanitize=thread
run team thread -fsanitize=thread
build address $address
run team address $address
run memory address $address -Wl,--wrap=aligned_alloc,--wrap=calloc

# Where there is no futex, helpers sleep on a condition variable.
"$CC" $flags -fsanitize=thread -DNQ_NO_FUTEX -c neoquant/native/pool.c -o "$built/thread/pool.c.o"
run team thread -fsanitize=thread

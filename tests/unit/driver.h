/* What programs for emulated machines read: cases from standard input. */
#include "weight.h"

#include <stdio.h>
#include <stdlib.h>

int nq_runs(int);

/* An int64 of bytes, and the bytes; 0 where there are none. */
static void *read_array(void) {
    int64_t bytes;
    if (fread(&bytes, 8, 1, stdin) != 1) exit(2);
    void *data = bytes ? malloc((size_t)bytes) : 0;
    if (bytes && fread(data, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(2);
    return data;
}

"""Programs in Triton that are not products: `running` starts every program, `gptq` rounds columns on a GPU as
`native.gptq` does on the CPU. Triton is imported when the first program is launched."""

"""Packing: the pictures in bits.py, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import forced

from neoquant.packing import pack, pack_nibbles, row_bytes, unpack, unpack_nibbles


@pytest.mark.parametrize("isa", ["off", "portable"])
@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_unpack_undoes_pack(isa: str, bits: int, rows: int, n: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    with forced(isa):
        words = pack(codes, bits)
        assert words.shape == (rows, row_bytes(n, bits))
        assert torch.equal(unpack(words, bits, n), codes)
    # the definition: a row is one number in base 2**bits, least significant code and byte first
    for row, stored in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert bytes(stored) == number.to_bytes(row_bytes(n, bits), "little")


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_many_rows_on_many_threads(bits: int) -> None:
    codes = torch.randint(2**bits, (301, 700), dtype=torch.uint8)
    with forced("off"):
        expected = pack(codes, bits)
    with forced("portable", threads=3):
        assert torch.equal(pack(codes, bits), expected) and torch.equal(unpack(expected, bits, 700), codes)


def test_four_bits_put_the_first_code_low() -> None:
    assert pack(torch.tensor([0xA, 0xB, 0xC], dtype=torch.uint8), 4).tolist() == [0xBA, 0x0C]


def test_three_bits_cross_bytes() -> None:
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    assert pack(codes, 3).tolist() == [0b11_010_001, 0b0_101_100_0, 0b000_111_11]


def test_rows_can_be_read_alone() -> None:
    codes = torch.arange(15, dtype=torch.uint8).reshape(3, 5) % 8
    assert torch.equal(unpack(pack(codes, 3)[1], 3, 5), codes[1])


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_nibbles_put_the_first_code_high(n: int) -> None:
    codes = torch.arange(1, n + 1, dtype=torch.uint8)
    words = pack_nibbles(codes, pad=0xF)
    padded = [*range(1, n + 1), 0xF]
    assert words.tolist() == [padded[i] << 4 | padded[i + 1] for i in range(0, n, 2)]
    assert torch.equal(unpack_nibbles(words, n), codes)


def test_wrong_sizes_and_types_are_refused() -> None:
    byte = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="5 codes of 4 bits take 3 bytes, got 2"):
        unpack(byte[:2], 4, 5)
    with pytest.raises(ValueError, match="take 2 bytes, got 3"):
        unpack_nibbles(byte, 3)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        pack(byte, 9)
    with pytest.raises(ValueError, match=r"uint8, got torch\.int64"):
        pack(byte.long(), 4)

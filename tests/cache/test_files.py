"""Caches on disk: what is loaded goes on where the saved one stood, and damage is noticed."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_tokens
from safetensors.numpy import load_file, save_file

import numbaflash


def filled(count, *, layers=2, dtype="float32", **options):
    rng = np.random.default_rng(count)
    cache = numbaflash.RingKVCache(
        layers, 2, 8, **{"capacity": 20, "sink_tokens": 3, "page_size": 8, "rollback": 6, "dtype": dtype} | options
    )
    for layer in range(layers):
        cache.append(layer, random_tokens(rng, count + layer, 2, 8), random_tokens(rng, count + layer, 2, 8))
    return cache


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 90), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 5))
def test_a_loaded_cache_goes_on_with_the_same_bits(tmp_path_factory, count, dtype, back):
    path = tmp_path_factory.mktemp("cache") / "cache.safetensors"
    saved = filled(count, dtype=dtype)
    saved.truncate(max(0, count - back))

    saved.save(path)
    loaded = numbaflash.RingKVCache.load(path)

    rng = np.random.default_rng(0)
    for tokens in (1, 5, 30):
        q, k, v = (random_tokens(rng, tokens, 2, 8) for _ in range(3))
        for layer in range(2):
            assert (loaded.length(layer), loaded.first(layer)) == (saved.length(layer), saved.first(layer))
            np.testing.assert_array_equal(loaded.step(layer, q, k, v), saved.step(layer, q, k, v))


def test_a_loaded_cache_truncates_as_far_as_the_saved_one(tmp_path):
    filled(90, layers=1).save(tmp_path / "c")
    loaded = numbaflash.RingKVCache.load(tmp_path / "c")
    with pytest.raises(ValueError, match="length must be at least 84"):
        loaded.truncate(83)
    loaded.truncate(84)
    assert loaded.length(0) == 84


def test_saving_replaces_a_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "c"
    path.write_bytes(b"old")
    filled(5).save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert numbaflash.RingKVCache.load(path).length(0) == 5


def test_a_folder_that_does_not_exist_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="missing"):
        filled(5).save(tmp_path / "missing" / "c")
    with pytest.raises(FileNotFoundError):
        numbaflash.RingKVCache.load(tmp_path / "missing")


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_noticed(tmp_path, place):
    path = tmp_path / "c"
    filled(40).save(path)
    content = bytearray(path.read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    content[header_end + int(place * (len(content) - header_end))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its content does not match its checksum"):
        numbaflash.RingKVCache.load(path)


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_a_file_that_is_cut_off_is_noticed(tmp_path, keep):
    path = tmp_path / "c"
    filled(40).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is damaged"):
        numbaflash.RingKVCache.load(path)


def test_a_header_that_was_changed_is_noticed(tmp_path):
    path = tmp_path / "c"
    filled(40).save(path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
    header["shape"] = header["shape"].replace('"capacity": 20', '"capacity": 21')
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(ValueError, match="checksum"):
        numbaflash.RingKVCache.load(path)


def test_other_files_and_other_versions_are_refused(tmp_path):
    path = tmp_path / "c"
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"holds no numbaflash\.RingKVCache"):
        numbaflash.RingKVCache.load(path)
    save_file({}, path, metadata={"format": "numbaflash.RingKVCache", "version": "2"})
    with pytest.raises(ValueError, match="has version '2', this release reads 1"):
        numbaflash.RingKVCache.load(path)

"""Caches on disk: what is loaded goes on where the saved one stood, and damage is noticed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_tokens
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import numbaflash
from numbaflash.cache import checked, files


def filled(count, *, layers=2, dtype="float32", **options):
    rng = np.random.default_rng(count)
    cache = numbaflash.RingKVCache(
        layers, 2, 8, **{"capacity": 20, "sink_tokens": 3, "page_size": 8, "rollback": 6, "dtype": dtype} | options
    )
    for layer in range(layers):
        cache.append(layer, random_tokens(rng, count + layer, 2, 8), random_tokens(rng, count + layer, 2, 8))
    return cache


@settings(max_examples=30)
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


def header_end(content):
    return 8 + struct.unpack("<Q", content[:8])[0]


@pytest.mark.parametrize(("place", "page"), [(0.0, "page 0 of layers.0.k"), (0.999, "page 3 of layers.1.v")])
def test_a_flipped_bit_is_noticed_and_the_page_named(tmp_path, place, page):
    path = tmp_path / "c"
    filled(40).save(path)
    content = bytearray(path.read_bytes())
    start = header_end(content)
    content[start + int(place * (len(content) - start))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged: {page} does not match its checksum"):
        numbaflash.RingKVCache.load(path)


@settings(max_examples=200)
@given(st.data())
def test_a_file_with_any_byte_changed_never_gives_other_tokens(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed"
    cache = filled(9, layers=1)
    cache.save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    if content[place] in b"\t\n\r":  # for a space between the header's words: that changes nothing
        with contextlib.suppress(ValueError):
            loaded = numbaflash.RingKVCache.load(path)
            np.testing.assert_array_equal(loaded._layers[0].ring.read(0, 9), cache._layers[0].ring.read(0, 9))
        return
    with pytest.raises(ValueError, match=r"is damaged|holds no|has version"):
        numbaflash.RingKVCache.load(path)


def test_the_safetensors_library_reads_it(tmp_path):
    cache = filled(15, layers=1, dtype="bfloat16")
    cache.save(tmp_path / "c", notes={"from": "a test"})
    tensors = load_file(tmp_path / "c")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {f"layers.0.{n}": (15, 2, 8) for n in "kv"}
    assert tensors["layers.0.k"].dtype == cache.dtype
    with safe_open(tmp_path / "c", framework="np") as file:
        assert file.metadata()["from"] == "a test"


@pytest.mark.parametrize(
    "array", [np.zeros(0, np.float32), np.zeros((), np.float32), np.zeros(2), np.zeros(2, ">f4")], ids=str
)
def test_an_attachment_that_cannot_be_stored_leaves_the_file_before(tmp_path, array):
    cache, path = filled(40), tmp_path / "c"
    cache.save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"attachments must be arrays of float32, .* none of them empty; got 'a' of"):
        cache.save(path, attachments={"a": array})
    assert (path.read_bytes(), os.listdir(tmp_path)) == (before, ["c"])


def test_notes_and_attachments_come_back(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1, 2), np.int8)}
    filled(40).save(tmp_path / "c", notes={"who": "somebody"}, attachments=arrays)
    with files.CacheFile(tmp_path / "c") as file:
        assert file.notes == {"who": "somebody"}
        assert {name: array.tolist() for name, array in file.attachments().items()} == {
            name: array.tolist() for name, array in arrays.items()
        }
    assert numbaflash.RingKVCache.load(tmp_path / "c").length(1) == 41


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "c"
    filled(5).save(path)
    written = []

    def full(descriptor, data, offset):
        written.append(len(data))
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data[: len(data) // 2 or 1], offset)  # short writes are legal, too

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        filled(40).save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert numbaflash.RingKVCache.load(path).length(0) == 5


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
    header = json.loads(content[8 : header_end(content)])["__metadata__"]
    header["shape"] = header["shape"].replace('"capacity": 20', '"capacity": 21')
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(ValueError, match="checksum"):
        numbaflash.RingKVCache.load(path)


def test_other_files_and_other_versions_are_refused(tmp_path):
    path = tmp_path / "c"
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"holds no numbaflash\.RingKVCache"):
        numbaflash.RingKVCache.load(path)
    save_file({}, path, metadata={"format": "numbaflash.RingKVCache", "version": "1"})
    with pytest.raises(ValueError, match="has version '1', this release reads 2"):
        numbaflash.RingKVCache.load(path)


@pytest.mark.parametrize(
    ("options", "forged"),
    [
        ({}, {"intact": 40, "raw_intact": 40}),
        ({}, {"raw_intact": 40}),
        ({}, {"raw_intact": 0}),
        ({"dtype": "int4"}, {"intact": 40}),
        ({"dtype": "int4"}, {"raw_intact": 40}),
        ({"dtype": "int4"}, {"raw_intact": 0}),
    ],
)
def test_a_file_without_the_tokens_that_the_next_query_sees_is_refused(tmp_path, monkeypatch, options, forged):
    state = files.LayerState
    monkeypatch.setattr(files, "LayerState", lambda *values: replace(state(*values), **forged))
    cache = numbaflash.RingKVCache(1, 2, 32, capacity=20, sink_tokens=3, page_size=8, rollback=5, **options)
    tokens = np.ones((41, 2, 32), np.float16)
    cache.append(0, tokens, tokens)
    cache.save(tmp_path / "c")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a layer 0 that cannot be"):
        numbaflash.RingKVCache.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_layers": 3}, "has 2 layers, and its shape 3"),
        ({"num_kv_heads": 4}, "a tensor layers.0.k that does not fit"),
        ({"dtype": "float16"}, "a tensor layers.0.k that does not fit"),
        ({"capacity": 10}, "a layer 0 that cannot be"),
        ({"length": -1}, "a layer 0 that cannot be"),
        ({"intact": 0}, "a layer 0 that cannot be"),
        ({"length": 39}, "a tensor layers.0.k that does not fit"),
        ({"length": "40"}, "is damaged"),
    ],
)
def test_a_file_that_contradicts_itself_under_right_checksums_is_refused(tmp_path, change, complaint):
    path = tmp_path / "c"
    filled(40).save(path)
    file = checked.CheckedFile(path)
    shape, layers = json.loads(file.notes["shape"]), json.loads(file.notes["layers"])
    for place in (shape, layers[0]):
        place.update({name: value for name, value in change.items() if name in place})
    pages = [(name, i, file.read(name, i)) for name, tensor in file.tensors.items() for i in range(tensor.pages)]
    notes = {**file.notes, "shape": json.dumps(shape), "layers": json.dumps(layers)}
    checked.write(path, notes, file.tensors, pages)
    file.close()
    with pytest.raises(ValueError, match=complaint):
        numbaflash.RingKVCache.load(path)

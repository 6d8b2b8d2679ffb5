"""A file appears whole or not at all, and is read only when it is of the expected kind and version."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.strategies import float_dtypes, generator, normal, seeds
from torch_simu import _files
from torch_simu._files import check_replaceable, kind_of, load_tensors, replacing, save_tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "result.bin"


class TestReplacing:
    @pytest.mark.parametrize("old", [None, b"old"])
    def test_the_file_takes_its_place_when_the_block_ends(self, path, old):
        if old is not None:
            path.write_bytes(old)
        with replacing(path) as temporary:
            assert temporary != path and temporary.parent == path.parent
            temporary.write_bytes(b"new")
            assert (path.read_bytes() if path.exists() else None) == old
        assert path.read_bytes() == b"new"
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("old", [None, b"old"])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_the_old_file_stays_and_nothing_is_left_when_the_block_raises(self, path, old, error):
        if old is not None:
            path.write_bytes(old)

        def write_half():
            with replacing(path) as temporary:
                temporary.write_bytes(b"half")
                raise error

        with pytest.raises(error):
            write_half()
        assert (path.read_bytes() if path.exists() else None) == old
        assert os.listdir(path.parent) == ([] if old is None else [path.name])

    @pytest.mark.parametrize("step", ["fsync", "umask"])
    def test_the_old_file_stays_when_finishing_fails(self, path, monkeypatch, step):
        path.write_bytes(b"old")

        def full(*_):
            raise OSError("No space left on device")

        with pytest.raises(OSError, match=r"No space left"), replacing(path) as temporary:
            temporary.write_bytes(b"new")
            monkeypatch.setattr(os, step, full)
        assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]

    def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_block_ends(self, path, monkeypatch):
        done = []
        sync, rename = os.fsync, Path.replace

        def note(descriptor):
            done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), rename(self, to)))
        with replacing(path) as temporary:
            temporary.write_bytes(b"new")
        assert done == ["file", "rename", "folder"]

    def test_a_block_that_removes_its_file_leaves_the_old_one(self, path):
        path.write_bytes(b"old")
        with pytest.raises(FileNotFoundError), replacing(path) as temporary:
            temporary.unlink()
        assert path.read_bytes() == b"old"

    @pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_permissions_follow_the_umask_and_the_umask_stays(self, path, umask, mode):
        before = os.umask(umask)
        try:
            with replacing(path) as temporary:
                assert stat.S_IMODE(temporary.stat().st_mode) & 0o077 == 0
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert os.umask(umask) == umask
        finally:
            os.umask(before)

    def test_a_name_is_taken_as_text_or_path_and_relative_to_the_working_folder(self, path, monkeypatch):
        monkeypatch.chdir(path.parent)
        with replacing("other.bin") as temporary:
            temporary.write_bytes(b"new")
        assert (path.parent / "other.bin").read_bytes() == b"new"

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"The folder of '.*none.r' does not exist, expected an existing"):
            replacing(tmp_path / "none" / "r").__enter__()

    def test_a_folder_in_its_place_is_refused_before_any_work(self, tmp_path):
        with pytest.raises(IsADirectoryError, match=r"'.*' is a folder, expected the name of a file"):
            replacing(tmp_path).__enter__()

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_may_not_be_written_is_refused(self, path):
        path.parent.chmod(0o500)
        try:
            with pytest.raises(PermissionError, match=r"is not writable, expected a folder that you may write to"):
                replacing(path).__enter__()
        finally:
            path.parent.chmod(0o700)

    def test_a_refused_temporary_file_is_said_to_be_a_folder_that_is_not_writable(self, path, monkeypatch):
        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(_files.tempfile, "mkstemp", refuse)
        with pytest.raises(PermissionError, match=r"The folder of '.*result.bin' is not writable"):
            replacing(path).__enter__()


class TestTensors:
    @given(seeds, float_dtypes, st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=3))
    def test_tensors_and_header_are_read_bit_for_bit(self, path, seed, dtype, extra):
        tensors = {
            "a.b": normal(seed, 3, 4, dtype=dtype),
            "transposed": normal(seed, 3, 4, dtype=dtype).t(),
            "empty": torch.zeros(0, dtype=torch.int64),
            "scalar": torch.tensor(True),
        }
        save_tensors(path, "Kind", tensors, {"extra": extra})
        loaded, header = load_tensors(path, "Kind")
        assert header == {"kind": "Kind", "version": 2, "extra": extra}
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)

    def test_what_cannot_be_written_leaves_the_old_file(self, path):
        save_tensors(path, "Kind", {"a": torch.ones(1)}, {})
        shared = torch.ones(2)
        with pytest.raises(RuntimeError, match=r"share memory"):
            save_tensors(path, "Kind", {"a": shared, "b": shared}, {})
        with pytest.raises(TypeError, match=r"not JSON serializable"):
            save_tensors(path, "Kind", {}, {"a": object()})
        assert torch.equal(load_tensors(path, "Kind")[0]["a"], torch.ones(1))
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            (None, "has no torch_simu header, expected a torch_simu file of kind 'Kind', version 2"),
            ({"format": "pt"}, "has no torch_simu header"),
            ({"torch_simu": json.dumps([1])}, "has no torch_simu header"),
            ({"torch_simu": "{"}, "is unreadable"),
            ({"torch_simu": json.dumps({"kind": "Other", "version": 1})}, "has kind 'Other', version 1"),
            ({"torch_simu": json.dumps({"kind": "Kind", "version": 3})}, "has kind 'Kind', version 3"),
            ({"torch_simu": json.dumps({"kind": "Kind", "version": 2})}, "does not have the sha256 that it names"),
            ({"torch_simu": json.dumps({})}, "has kind None, version None"),
        ],
    )
    def test_another_header_is_refused(self, path, metadata, message):
        save_file({"a": torch.ones(1)}, path, metadata)
        with pytest.raises(ValueError, match=f"File '.*result.bin' {message}"):
            load_tensors(path, "Kind")

    @pytest.mark.parametrize("content", [b"", b"hello, world", b"\xff" * 100, b"\x08" + bytes(7) + b"{}      "])
    def test_another_format_is_refused(self, path, content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"File '.*result.bin' .*, expected a torch_simu file of kind 'Kind'"):
            load_tensors(path, "Kind")

    def test_a_missing_file_and_a_folder_are_named(self, path):
        with pytest.raises(FileNotFoundError, match=r"File '.*result.bin' does not exist, expected a torch_simu file"):
            load_tensors(path, "Kind")
        with pytest.raises(IsADirectoryError, match=r"'.*' is a folder, expected a torch_simu file of kind 'Kind'"):
            load_tensors(path.parent, "Kind")

    @given(seeds)
    def test_any_flipped_bit_is_refused(self, tmp_path_factory, seed):
        path = tmp_path_factory.mktemp("files") / "result.bin"
        save_tensors(path, "Kind", {"a": normal(seed, 3, 5), "b": torch.arange(7)}, {"rate": 1e-5, "name": "a/b"})
        whole = path.read_bytes()
        for place in torch.randint(8 * len(whole), (20,), generator=generator(seed)).tolist():
            path.write_bytes(flipped(whole, place))
            with pytest.raises(ValueError, match=r"File '.*result.bin' .*, expected"):
                load_tensors(path, "Kind")

    def test_a_file_is_the_same_to_the_last_byte_whenever_it_is_written(self, path):
        tensors = {"b": torch.ones(3), "a": torch.zeros(2)}
        save_tensors(path, "Kind", tensors, {"x": 1, "y": [2]})
        first = path.read_bytes()
        save_tensors(path, "Kind", dict(reversed(tensors.items())), {"y": [2], "x": 1})
        assert path.read_bytes() == first

    def test_a_header_may_have_a_checksum_of_its_own_name_inside(self, path):
        save_tensors(path, "Kind", {}, {"nested": {"checksum": "x", "kind": "y"}})
        assert load_tensors(path, "Kind")[1]["nested"] == {"checksum": "x", "kind": "y"}

    def test_a_file_of_version_1_is_read_with_a_warning(self, path):
        header = json.dumps({"kind": "Kind", "version": 1, "extra": 3})
        save_file({"a": torch.ones(2)}, path, {"torch_simu": header})
        with pytest.warns(UserWarning, match=r"result.bin' is of version 1 and has no checksum.*Save it again"):
            tensors, found = load_tensors(path, "Kind")
        assert torch.equal(tensors["a"], torch.ones(2)) and found["extra"] == 3

    def test_version_1_is_no_way_around_the_checksum(self, path):
        save_tensors(path, "Kind", {"a": torch.ones(2)}, {})
        path.write_bytes(path.read_bytes().replace(b'\\"version\\": 2', b'\\"version\\": 1'))
        with pytest.raises(ValueError, match="does not have the sha256 that it names"):
            load_tensors(path, "Kind")

    def test_the_kind_of_a_file_is_told_without_reading_it(self, path):
        assert kind_of(path) is None
        path.write_bytes(b"hello")
        assert kind_of(path) is None
        save_tensors(path, "Kind", {}, {})
        assert kind_of(path) == "Kind"


class TestReplaceable:
    def test_only_an_earlier_result_is_replaced_and_only_when_asked(self, path):
        check_replaceable(path, ours=False, force=False)
        path.write_text("x")
        for ours in (False, True):
            with pytest.raises(FileExistsError, match=r"exists, expected a new file. Give another, or --force"):
                check_replaceable(path, ours=ours, force=False)
        with pytest.raises(FileExistsError, match=r"exists and is no earlier result, expected a new file"):
            check_replaceable(path, ours=False, force=True)
        check_replaceable(path, ours=True, force=True)
        with pytest.raises(IsADirectoryError, match=r"is a folder, expected the name of a file"):
            check_replaceable(path.parent, ours=True, force=True)
        with pytest.raises(FileNotFoundError, match=r"The folder of .* does not exist"):
            check_replaceable(path / "x", ours=False, force=False)

    def test_a_link_that_leads_nowhere_is_something(self, path):
        path.symlink_to(path.parent / "none")
        with pytest.raises(FileExistsError, match=r"exists, expected a new file"):
            check_replaceable(path, ours=False, force=False)


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)

import io
import pickle
import struct
import zipfile

import pytest
import torch
from tests.worker import models
from tests.worker.desk import script
from torch import nn

from curvature_worker import admission
from curvature_worker.admission import admit


@pytest.fixture
def judge(tmp_path):
    """Judges bytes; returns the refusal, or None."""

    def run(data):
        source = tmp_path / "model"
        source.write_bytes(data)
        refusal = admit(source, tmp_path / "admitted")
        assert (tmp_path / "admitted").exists() == (refusal is None)
        return refusal

    return run


def archive(entries, compression=zipfile.ZIP_STORED):
    """A zip archive of (name, bytes) pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        for name, data in entries:
            made.writestr(name, data)
    return buffer.getvalue()


def scripted_entries():
    with zipfile.ZipFile(io.BytesIO(script(models.small()))) as made:
        return [(name, made.read(name)) for name in made.namelist()]


def with_entry(name, data):
    """A real model with one entry exchanged or added."""
    entries = dict(scripted_entries())
    root = next(iter(entries)).split("/")[0]
    return archive({**entries, f"{root}/{name}": data}.items())


def patched(data, flags=None, method=None):
    """The archive with the flags or the method of all directory entries changed."""
    changed = bytearray(data)
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        if flags is not None:
            changed[at + 8 : at + 10] = struct.pack("<H", flags)
        if method is not None:
            changed[at + 10 : at + 12] = struct.pack("<H", method)
        at = data.find(b"PK\x01\x02", at + 4)
    return bytes(changed)


def saved(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


class TestAccepted:
    def test_a_scripted_model_computes_the_same_after_repacking(self, judge, tmp_path):
        assert judge(script(models.small())) is None
        again = torch.jit.load(tmp_path / "admitted")
        x, _ = models.batch()
        assert torch.equal(again(x), models.small()(x))

    def test_a_traced_model_is_accepted(self, judge):
        traced = torch.jit.trace(models.small(), models.batch()[0])
        assert judge(saved(lambda f: torch.jit.save(traced, f))) is None

    def test_a_model_whose_classes_live_in_a_package_called_models_is_accepted(self, judge):
        # Its code lies under code/__torch__/…/models/, which is no torch.export program.
        assert judge(with_entry("code/__torch__/models/net.py", b"")) is None

    def test_what_is_written_is_stored_plainly(self, judge, tmp_path):
        judge(script(models.small()))
        with zipfile.ZipFile(tmp_path / "admitted") as made:
            assert {entry.compress_type for entry in made.infolist()} == {zipfile.ZIP_STORED}

    def test_equal_models_are_admitted_as_equal_bytes(self, judge, tmp_path):
        data = script(models.small())
        judge(data)
        first = (tmp_path / "admitted").read_bytes()
        judge(data)
        assert (tmp_path / "admitted").read_bytes() == first

    def test_folders_are_left_out(self, judge, tmp_path):
        judge(with_entry("empty/", b""))
        with zipfile.ZipFile(tmp_path / "admitted") as made:
            assert not any(entry.is_dir() for entry in made.infolist())


EXPORTED = "torch.export"


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "empty"),
        (b"once upon a time", "starts with b'once upo'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (pickle.dumps({}, protocol=2), "torch.save"),
        (b"PK\x03\x04" + b"\x00" * 100, "truncated"),
        (archive([]), "no TorchScript"),
        (archive([("a/x", b""), ("b/y", b"")]), "not in one folder"),
        (archive([("m/x", b"")]), "data.pkl"),
        (archive([("m/archive_format", b"pt2"), ("m/models/model.json", b"{}")]), "no data/weights"),
        (archive([("serialized_exported_program.json", b"{}"), ("version", b"8")]), EXPORTED),
    ],
    ids=["empty", "text", "lfs", "pickle", "truncated", "empty zip", "roots", "other zip", "pt2", "old pt2"],
)
def test_what_is_no_model_is_refused_with_what_came(judge, data, part):
    refusal = judge(data)
    assert part in refusal.message
    assert refusal.remedy


def test_a_checkpoint_is_named(judge):
    refusal = judge(saved(lambda f: torch.save(models.small().state_dict(), f)))
    assert "torch.save" in refusal.message
    assert "torch.jit.save" in refusal.remedy


def test_a_pickled_module_is_named(judge):
    assert "torch.save" in judge(saved(lambda f: torch.save(nn.Linear(1, 1), f))).message


def test_a_model_cut_short_is_truncated(judge):
    data = script(models.small())
    assert "truncated" in judge(data[: len(data) // 2]).message


def test_a_flipped_bit_is_damage(judge):
    net = models.small()
    data = bytearray(script(net))
    data[data.find(net[0].weight.detach().numpy().tobytes())] ^= 1
    assert "damaged" in judge(bytes(data)).message


class TestHostile:
    @pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "m/../../x", "C:/x", "\\\\host\\x"])
    def test_paths_that_lead_outside(self, judge, name):
        refusal = judge(archive([*scripted_entries(), (name, b"")]))
        assert "outside" in refusal.message or "one folder" in refusal.message

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_an_entry_named_twice(self, judge):
        entries = scripted_entries()
        assert "twice" in judge(archive([*entries, entries[0]])).message

    def test_an_encrypted_archive(self, judge):
        assert "encrypted" in judge(patched(archive(scripted_entries()), flags=1)).message

    def test_a_compression_that_torchscript_has_not(self, judge):
        assert "compression" in judge(archive(scripted_entries(), zipfile.ZIP_LZMA)).message

    def test_a_bomb(self, judge, monkeypatch):
        monkeypatch.setattr(admission, "MAX_INFLATED_BYTES", 10 * 2**20)
        bomb = archive([*scripted_entries(), ("m/data/0", b"\x00" * (20 * 2**20))], zipfile.ZIP_DEFLATED)
        assert len(bomb) < 2**20
        assert "unpack" in judge(bomb).message

    def test_an_entry_that_claims_to_be_small(self, judge):
        data = archive([*scripted_entries(), ("m/big", b"\x00" * 2**20)], zipfile.ZIP_DEFLATED)
        lying = bytearray(data)
        at = data.rfind(b"PK\x01\x02")
        lying[at + 24 : at + 28] = struct.pack("<I", 10)  # of its uncompressed size
        assert judge(bytes(lying)) is not None

    def test_entries_that_share_their_bytes(self, judge):
        data = archive([("m/a", b"x" * 50_000), ("m/b", b"y" * 50_000)])
        overlapping = bytearray(data)
        second = data.rfind(b"PK\x01\x02")
        overlapping[second + 20 : second + 28] = struct.pack("<II", 90_000, 90_000)
        assert "claim more" in judge(bytes(overlapping)).message

    def test_too_many_entries(self, judge, monkeypatch):
        monkeypatch.setattr(admission, "MAX_ENTRIES", 5)
        assert "at most 5" in judge(script(models.small())).message

    @pytest.mark.parametrize("target", ["os system", "builtins eval", "torchvision x", "torch.serialization load"])
    @pytest.mark.parametrize("place", ["data.pkl", "constants.pkl", "code/a.py.debug_pkl"])
    def test_a_pickle_that_calls_what_no_model_calls(self, judge, target, place):
        module, name = target.split()
        refusal = judge(with_entry(place, f"c{module}\n{name}\n.".encode()))
        assert target in refusal.message

    def test_a_pickle_that_takes_its_call_off_the_stack(self, judge):
        assert "'?'" in judge(with_entry("data.pkl", b"\x80\x04\x8c\x02os\x8c\x06system\x93.")).message

    def test_a_pickle_that_is_none(self, judge):
        assert judge(with_entry("data.pkl", b"\xfenonsense")) is not None

    def test_a_pickle_too_large_to_read(self, judge, monkeypatch):
        monkeypatch.setattr(admission, "_MAX_PICKLE_BYTES", 10)
        assert "10 are accepted" in judge(script(models.small())).message


def test_memory_stays_flat_while_repacking(judge, tmp_path):
    import tracemalloc

    big = nn.Linear(4096, 2048)  # 32 MiB
    data = script(big)
    (tmp_path / "big").write_bytes(data)
    del data
    tracemalloc.start()
    try:
        assert admit(tmp_path / "big", tmp_path / "out") is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20

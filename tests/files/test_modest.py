"""Files that are not what they seem: refused by name, before memory or time is spent on them."""

import os
import resource
import subprocess
import sys
import zipfile

import pytest
import torch

from lightning_selfcompress.errors import CheckpointError
from lightning_selfcompress.files.atomic_write import write_beside
from lightning_selfcompress.files.checkpoint import read_checkpoint

FACTS = {"pytorch-lightning_version": "2.6.0", "epoch": 1, "global_step": 3}


def save(folder, state_dict, **more):
    path = folder / "net.ckpt"
    torch.save({**FACTS, "state_dict": state_dict, **more}, path)
    return path


def compressed(folder):
    path = save(folder, {"weight": torch.zeros(100_000)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "small.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return folder / "small.ckpt"


def views(n):
    storage = torch.zeros(100_000)
    return {f"w{i}": storage[i:] for i in range(n)}


ODD = {
    "expanded": (lambda f: save(f, {"weight": torch.zeros(1).expand(20_000, 20_000)}), "state_dict.weight' of shape"),
    "expanded elsewhere": (lambda f: save(f, {}, hyper=[torch.zeros(1).expand(10**9)]), r"hyper\[0\]' of shape"),
    "of many views": (lambda f: save(f, views(500)), "shares memory with many others"),
    "compressed": (compressed, "stored uncompressed .* found '.*net/data.pkl'|stored uncompressed"),
    "without values": (lambda f: save(f, {"weight": torch.zeros(3, device="meta")}), "'state_dict.weight', a meta"),
    "sparse": (lambda f: save(f, {"weight": torch.eye(3).to_sparse()}), "'state_dict.weight', a torch.sparse_coo"),
    "named by half a character": (lambda f: save(f, {"w\ud800": torch.zeros(3)}), "names of whole characters"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_checkpoints(kind, tmp_path):
    """Each is a CheckpointError that names the file and what is odd in it."""
    make, reason = ODD[kind]
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_checkpoint(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("kind", ["expanded", "of many views", "compressed"])
def test_memory_stays_in_proportion(kind, tmp_path):
    """The command refuses them within 600 MB of address space beyond what it takes to say its help with torch."""
    path = ODD[kind][0](tmp_path)
    program = (
        "import resource, sys\nimport torch\nfrom lightning_selfcompress.cli.main import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"status = main(['inspect', {str(path)!r}])\n"
        "print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    status, kilobytes = map(int, done.stdout.split())
    assert status == 1
    assert kilobytes < 300_000  # the modules that `inspect` imports are most of it
    assert resource.getpagesize()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_devices_are_no_files(path):
    """A device has no end: it is refused before it is read."""
    with pytest.raises(OSError, match="a device, a pipe or a socket"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["ä" * 120 + ".bin", "名" * 80 + ".bin", "n" * 251 + ".bin"])
def test_long_names(name, tmp_path):
    """Names of up to 255 bytes are written, whatever their characters."""
    assert len(os.fsencode(name)) <= 255
    write_beside(tmp_path / name, lambda part: part.write_bytes(b"content"))
    assert (tmp_path / name).read_bytes() == b"content"
    assert len(list(tmp_path.iterdir())) == 1


def test_links_in_a_circle(tmp_path):
    """Links that lead round in a circle are no path to write to, and stay."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(OSError, match=r"circle|symbolic links"):
        write_beside(one, lambda part: part.write_bytes(b"content"))
    assert one.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2

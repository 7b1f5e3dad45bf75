"""selfcompress diff."""

import pytest
import torch
from commands import values
from networks import Lit
from torch import nn

from lightning_selfcompress import convert, export, load, load_from_checkpoint


@pytest.mark.parametrize("pair", [("net.scnn", "net.scnn"), ("net.ckpt", "net.scnn"), ("net.ckpt", "weights.ckpt")])
def test_equal(said, pair):
    """A network is equal to itself, in whatever kind of file: status 0."""
    status, lines, err = said("diff", *pair)
    assert (status, lines[-1], err) == (0, "The same network in both.", "")
    status, found = values(said, "diff", *pair)
    assert (status, found["equal"], found["differences"]) == (0, True, [])


def test_other_values(said, folder):
    """Rounded to float16, tensors differ in bytes and by so much; codes do not: status 2."""
    status, found = values(said, "diff", "net.scnn", "half.scnn")
    assert (status, found["equal"]) == (2, False)
    one, other = (load(f, Lit()).state_dict() for f in ("net.scnn", "half.scnn"))
    expected = {n: float((one[n].double() - other[n].double()).abs().max()) for n in one}
    assert {d["name"]: d["largest"] for d in found["differences"]} == {n: d for n, d in expected.items() if d}
    for d in found["differences"]:
        assert (d["a"]["stored_as"], d["b"]["stored_as"], d["a"]["bits"]) == ("float32", "float16", None)
        assert d["a"]["nbytes"] == 2 * d["b"]["nbytes"]
    assert found["b"]["nbytes"] == (folder / "half.scnn").stat().st_size


def test_other_shapes(said):
    """Against the float network every layer has other widths or bits, shown side by side."""
    status, lines, _ = said("diff", "net.scnn", "float.ckpt")
    assert status == 2
    _, found = values(said, "diff", "net.scnn", "float.ckpt")
    by_name = {d["name"]: d for d in found["differences"]}
    shrunk = by_name["net.4.weight"]
    assert shrunk["b"]["shape"] == [16, 216]
    assert shrunk["a"]["shape"] < shrunk["b"]["shape"]
    assert (shrunk["a"]["stored_as"], shrunk["b"]["stored_as"], shrunk["largest"]) == ("codes", "float32", None)
    (line,) = [line.split() for line in lines if line.startswith("net.4.weight")]
    assert line[1:3] == ["x".join(map(str, shrunk[side]["shape"])) for side in "ab"]
    assert line[3:5] == [f"{shrunk['a']['bits']:.2f}", "float32"]
    assert lines[-1] == f"{len(by_name)} tensors differ."


def test_one_bit(said):
    """A single weight that has another code makes a difference, and its size is shown."""
    model = load_from_checkpoint(Lit, "net.ckpt")
    with torch.no_grad():
        layer = model.net[6]
        column = layer.weight.abs().sum(0).argmax()
        before = float(layer.weight[0, column])
        layer.latent("weight")[0, column] *= -1
        after = float(layer.weight[0, column])
    assert before != after
    export(model, "other.scnn")
    status, found = values(said, "diff", "net.scnn", "other.scnn")
    assert (status, [d["name"] for d in found["differences"]]) == (2, ["net.6.weight"])
    assert found["differences"][0]["largest"] == pytest.approx(abs(before - after))
    assert said("diff", "net.scnn", "other.scnn")[1][-1] == "1 tensor differs."


def test_other_names(said):
    """What only one of them has is absent in the other."""
    model = load_from_checkpoint(Lit, "net.ckpt")
    export(model.net, "inner.scnn")
    status, found = values(said, "diff", "inner.scnn", "net.scnn")
    assert status == 2
    assert {(d["a"] is None, d["b"] is None) for d in found["differences"]} == {(True, False), (False, True)}
    assert any("absent" in line for line in said("diff", "inner.scnn", "net.scnn")[1])


def test_groups(said):
    """Convolutions of the same weights in other groups differ."""
    for groups, conv in ((2, nn.Conv2d(4, 4, 1, groups=2)), (1, nn.Conv2d(2, 4, 1))):
        nn.init.ones_(conv.weight)
        nn.init.zeros_(conv.bias)
        convert(conv)
        export(conv, f"groups{groups}.scnn")
    _, found = values(said, "diff", "groups2.scnn", "groups1.scnn")
    assert [(d["name"], d["b"]) for d in found["differences"]] == [("groups", None)]


def test_not_a_number(said):
    """NaN is equal to NaN, and differs from numbers by null."""
    for name, value in (("nan", torch.nan), ("number", 1.0)):
        state = {"a": torch.tensor([value, 2.0])}
        torch.save({"state_dict": state, "pytorch-lightning_version": "2.6"}, f"{name}.ckpt")
    assert values(said, "diff", "nan.ckpt", "nan.ckpt")[0] == 0
    status, found = values(said, "diff", "nan.ckpt", "number.ckpt")
    assert (status, found["differences"][0]["largest"]) == (2, None)


def test_keys_and_statuses_are_in_the_help(said):
    """--help tells the keys of --json and what the exit statuses mean."""
    text = " ".join(said("diff", "--help")[1])
    words = set(text.replace(",", " ").replace("(", " ").replace(")", " ").replace(":", " ").split())
    _, found = values(said, "diff", "net.scnn", "float.ckpt")
    rows = [found, found["a"], *found["differences"], found["differences"][0]["a"]]
    assert {key for row in rows for key in row} <= words | {"nbytes;"}
    assert "0 if they hold the same network, 2 if they differ, 1 if something is wrong" in text

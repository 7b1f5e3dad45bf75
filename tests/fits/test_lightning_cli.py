"""SelfCompression from LightningCLI: YAML, command line and help."""

import inspect
import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from compressing import assert_shrunk
from fits import Kill, data
from lightning.pytorch.cli import LightningCLI
from networks import Lit
from torch import nn

from lightning_selfcompress import SelfCompression, Teacher, size_report
from lightning_selfcompress.size.prices import PRICES

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
ARGUMENTS = {
    "gamma": 0.02,
    "target_size": None,
    "price": "bytes",
    "initial_bits": 7.0,
    "bits_lr": 0.02,
    "cooldown": 0.5,
    "skip": ["torch.nn.Embedding", "net.6"],
    "prune_every_n_epochs": 1,
    "round_to": 1,
    "teacher": None,
    "activations": None,
}
QUIET = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class WithEmbedding(Lit):
    """Has a layer of a type to skip, too."""

    def __init__(self):
        super().__init__()
        self.net.append(nn.Identity())
        self.table = nn.Embedding(4, 4)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]) + self.table.weight.mean(), batch[1])


def command_line(*args, model=Lit, **callback):
    """LightningCLI on a YAML file's content with this callback, if any, and on more arguments; nothing is run."""
    config = {"trainer": QUIET | {"callbacks": []}}
    if callback:
        name = "lightning_selfcompress.SelfCompression"
        config["trainer"]["callbacks"].append({"class_path": name, "init_args": callback})
    return LightningCLI(model, run=False, args=["--config", yaml.safe_dump(config), *args], save_config_callback=None)


def compression_of(cli):
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, SelfCompression)]
    return callback


def fit(cli):
    cli.trainer.callbacks.append(Kill())
    torch.manual_seed(1)
    cli.trainer.fit(cli.model, data(torch.float32))
    return cli.model, cli.trainer


@pytest.mark.case("LightningCLI", "a YAML file with every argument")
def test_yaml_with_every_argument():
    """Every argument of the callback is read from YAML, and the fit compresses."""
    assert ARGUMENTS.keys() == inspect.signature(SelfCompression).parameters.keys()
    cli = command_line(model=WithEmbedding, **ARGUMENTS)
    callback = compression_of(cli)
    assert callback.skip == (nn.Embedding, "net.6")
    assert {name: getattr(callback, name) for name in ARGUMENTS if name != "skip"} == {
        name: value for name, value in ARGUMENTS.items() if name != "skip"
    }
    model, trainer = fit(cli)
    assert_shrunk(model, trainer)
    assert type(model.table) is nn.Embedding
    assert type(model.net[6]) is nn.Linear


@pytest.mark.case("LightningCLI", "a YAML file with target_size: {target}")
@pytest.mark.parametrize(("target", "price"), [("1500", "bytes"), ("1.5KB", "bits"), ("10%", "gammas.squares")])
def test_target_size_in_yaml(target, price):
    """A size to end at is read from YAML, with a price by its name or by the path of a function."""
    cli = command_line("--trainer.max_epochs=3", target_size=int(target) if target.isdigit() else target, price=price)
    callback = compression_of(cli)
    assert callback.gamma is None
    assert callback.target_size == (1500 if target == "1500" else target)
    assert callback.price == price or callback.price.__name__ == "squares"
    torch.manual_seed(1)
    cli.trainer.fit(cli.model, data(torch.float32))
    report = size_report(cli.model)
    assert report.nbytes <= max(1500, 0.1 * report.float_nbytes)


@pytest.mark.case("LightningCLI", "price: {price}")
@pytest.mark.parametrize("price", PRICES)
def test_price_in_yaml(price):
    """Every price is read from YAML by its name."""
    assert compression_of(command_line(gamma=0.1, price=price)).price == price


@pytest.mark.case("LightningCLI", "--trainer.callbacks+={name} --trainer.callbacks.gamma=0.05")
@pytest.mark.parametrize("name", ["SelfCompression", "lightning_selfcompress.SelfCompression"])
def test_appended_on_the_command_line(name):
    """Appended to the callbacks there are, by its short name once it was imported, it compresses."""
    cli = command_line(f"--trainer.callbacks+={name}", "--trainer.callbacks.gamma=0.05")
    assert compression_of(cli).gamma == 0.05
    assert_shrunk(*fit(cli))


@pytest.mark.case("LightningCLI", "the optimizer and the scheduler from the command line, too")
def test_with_an_optimizer_of_the_command_line():
    """An optimizer that the command line makes gets no depths, and the fit compresses."""
    scheduler = ["--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=2"]
    cli = command_line("--optimizer=AdamW", "--optimizer.weight_decay=0.5", *scheduler, gamma=0.01)
    model, trainer = fit(cli)
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert_shrunk(model, trainer)


GAMMAS = {
    "a number": (0.1, [0.1, 0.1]),
    "the path of a function": ("gammas.tenth", [0.0, 0.1]),
    "a class path with init_args": (
        {"class_path": "gammas.Ramp", "init_args": {"gamma": 0.4, "steps": 10}},
        [0.0, 0.2],
    ),
}


@pytest.mark.case("LightningCLI", "gamma as {form}")
@pytest.mark.parametrize("form", GAMMAS)
def test_gamma_in_yaml(form):
    """A gamma ramp needs no lambda: YAML names a function, or a class whose objects can be called."""
    value, (first, fifth) = GAMMAS[form]
    cli = command_line(gamma=value)
    gamma = compression_of(cli).gamma
    gammas = [gamma(0), gamma(5)] if callable(gamma) else [gamma, gamma]
    assert gammas == [first, fifth]
    assert_shrunk(*fit(cli))


@pytest.mark.case("LightningCLI", "gamma as text that is neither number nor path")
def test_gamma_that_is_no_function(refusal, capsys):
    """What cannot be read as gamma is refused by name before anything is made."""
    with pytest.raises(SystemExit):
        command_line(gamma="lambda step: 0.1")
    said = capsys.readouterr().err
    assert "gamma" in said
    assert "lambda step: 0.1" in said
    refusal.say(next(line for line in said.splitlines() if "error:" in line))


@pytest.mark.case("LightningCLI", "a value out of its range")
def test_value_out_of_range(refusal):
    """The callback's own message reaches the command line."""
    with refusal(ValueError, "Expected cooldown from 0 to 1 .*, got 1.5"):
        command_line(gamma=0.1, cooldown=1.5)


@pytest.mark.case("LightningCLI", "--print_config")
def test_printed_config_is_the_same_callback(capsys):
    """What --print_config prints holds every argument, and read again makes the same callback."""
    with pytest.raises(SystemExit):
        command_line("--print_config", **ARGUMENTS)
    printed = yaml.safe_load(capsys.readouterr().out)
    (callback,) = printed["trainer"]["callbacks"]
    assert callback["init_args"] == ARGUMENTS
    again = compression_of(command_line(**callback["init_args"]))
    assert (again.gamma, again.skip) == (0.02, (nn.Embedding, "net.6"))


@pytest.mark.case("LightningCLI", "--trainer.callbacks.help=SelfCompression")
def test_help_explains_each_argument(capsys):
    """The help has every argument's name, default and description, as the docstring has it."""
    with pytest.raises(SystemExit):
        command_line("--trainer.callbacks.help=SelfCompression")
    said = " ".join(capsys.readouterr().out.split())
    section = inspect.getdoc(SelfCompression).partition("Args:\n")[2].partition("\n\nRaises:")[0]
    described = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.M))
    assert described.keys() == inspect.signature(SelfCompression).parameters.keys()
    for name, text in described.items():
        assert f"--trainer.callbacks.{name}" in said
        assert " ".join(text.split()) in said
    assert "default: 8.0" in said


def snippet(language):
    section = PAGE.partition("## A training from YAML\n")[2].partition("\n## ")[0]
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)
    return text


@pytest.mark.case("LightningCLI", "the documentation's example, run as it stands")
def test_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    """The files and commands of the documentation train a network that gets smaller, and explain the arguments."""
    (tmp_path / "main.py").write_text(snippet("py"))
    (tmp_path / "compress.yaml").write_text(snippet("yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = snippet("console").splitlines()
    assert len(commands) == 3
    for command in commands:
        python, *arguments = command.split()
        assert (python, arguments[0]) == ("python", "main.py")
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) if "help" in command else nullcontext():
            runpy.run_path("main.py", run_name="__main__")
    monkeypatch.delitem(sys.modules, "main")
    assert "Loss per bit of the average weight" in " ".join(capsys.readouterr().out.split())
    sizes = []
    for version in ("version_0", "version_1"):
        config = yaml.safe_load((tmp_path / "lightning_logs" / version / "config.yaml").read_text())
        arguments = config["trainer"]["callbacks"][0]["init_args"]
        assert arguments.keys() == ARGUMENTS.keys()
        (saved,) = (tmp_path / "lightning_logs" / version / "checkpoints").glob("*.ckpt")
        depths = [t for k, t in torch.load(saved, weights_only=True)["state_dict"].items() if k.endswith("bit_depth")]
        sizes.append((arguments["gamma"], len(depths), float(torch.cat(depths).mean())))
    (ramp, three, _), (number, four, bits) = sizes
    assert ramp == {"class_path": "main.Ramp", "init_args": {"gamma": 0.1, "steps": 1000}}
    assert (number, three, four) == (0.05, 3, 4)
    assert bits < 8


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_teacher(weight):
    """A teacher is a word or a path, or an object that says more."""
    more = {"class_path": "lightning_selfcompress.Teacher", "init_args": {"outputs": "net", "weight": weight}}
    teacher = compression_of(command_line(gamma=0.1, teacher="start" if weight == 1.0 else more)).teacher
    assert teacher == Teacher("start", outputs=None if weight == 1.0 else "net", weight=weight)

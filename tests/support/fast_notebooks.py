"""Fast settings of the notebooks: what CI replaces in their code, each text of which has to be found."""

from collections.abc import Mapping

from nbformat import NotebookNode

# Name of a notebook -> text of its code -> what stands there in a fast run.
FAST: Mapping[str, Mapping[str, str]] = {
    "1-quickstart": {"max_epochs=40": "max_epochs=3"},
    "2-how-it-works": {"steps = 1200": "steps = 100", "epochs = 40": "epochs = 3"},
    "3-a-size": {
        "epochs = 24": "epochs = 3",
        '"2KB", "4KB", "8KB", "16KB"': '"4KB", "16KB"',
        "2KB 4KB 8KB 16KB": "4KB 16KB",
    },
    "4-pretrained": {
        "blocks=5": "blocks=3",
        "compressing_epochs = 30": "compressing_epochs = 3",
        "max_epochs=epochs": "limit_train_batches=10, max_epochs=epochs",
    },
    "5-transformer": {"sorted(topics))": "sorted(topics)[:12])", "epochs = 6": "epochs = 3"},
    "6-deploy": {
        "epochs = 30": "epochs = 3",
        "max_epochs=epochs": "limit_train_batches=40, max_epochs=epochs",
        "rounds, calls = 200, 20": "rounds, calls = 5, 2",
    },
    "7-when-accuracy-falls": {"epochs = 30": "epochs = 3"},
}


def make_fast(notebook: NotebookNode, name: str) -> None:
    """Puts the fast settings of a notebook into its code.

    Args:
        notebook: The notebook, which is changed.
        name: Its file name without suffix.

    Raises:
        KeyError: If the notebook has no fast settings.
        ValueError: If its code lacks a text that is to be replaced.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, new in FAST[name].items():
        if not any(old in cell.source for cell in code):
            raise ValueError(f"Expected {old!r} in the code of {name}, which is to become {new!r} in a fast run.")
        for cell in code:
            cell.source = cell.source.replace(old, new)

"""pytorch-forecasting: networks of time series, with their own losses."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from entry import Entry
from pytorch_forecasting import (
    MAE,
    DecoderMLP,
    DeepAR,
    NBeats,
    NHiTS,
    RecurrentNetwork,
    TemporalFusionTransformer,
    TimeSeriesDataSet,
)
from torch import Tensor, nn

Batch = tuple[dict[str, Any], Any]


@cache
def series(alone: bool) -> TimeSeriesDataSet:
    """Four random series; alone, or with a covariate and a category."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "group": np.repeat([f"g{i}" for i in range(4)], 30),
            "time": np.tile(np.arange(30), 4),
            "value": random.normal(size=120).cumsum(),
            "known": random.normal(size=120),
            "kind": random.choice(["a", "b", "c"], 120),
        }
    )
    more = {} if alone else {"time_varying_known_reals": ["known", "time"], "time_varying_known_categoricals": ["kind"]}
    groups = {} if alone else {"static_categoricals": ["group"]}
    return TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=8,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        **more,
        **groups,
    )


def batch(alone: bool) -> Batch:
    """One batch of the series."""
    return next(iter(series(alone).to_dataloader(train=True, batch_size=4, num_workers=0)))


def loss(net: Any, batch: Batch) -> tuple[Tensor, Any]:
    """The network's own loss."""
    x, y = batch
    prediction = net(x)["prediction"]
    return net.loss(prediction, y), prediction


def _entry(name: str, kind: Any, *, alone: bool = False, **arguments: Any) -> Entry:
    def make() -> nn.Module:
        return kind.from_dataset(series(alone), learning_rate=1e-3, **arguments)

    return Entry("pytorch-forecasting", name, make, lambda: batch(alone), loss)


ENTRIES = (
    _entry(
        "TFT",
        TemporalFusionTransformer,
        hidden_size=16,
        attention_head_size=2,
        hidden_continuous_size=8,
        dropout=0.1,
    ),
    _entry("DeepAR", DeepAR, hidden_size=16, rnn_layers=2),
    _entry("RecurrentNetwork", RecurrentNetwork, cell_type="GRU", hidden_size=16, rnn_layers=2),
    _entry("N-BEATS", NBeats, alone=True, loss=MAE(), widths=[16, 32], num_blocks=[2, 2], num_block_layers=[2, 2]),
    _entry("N-HiTS", NHiTS, loss=MAE(), hidden_size=16, n_blocks=[1, 1, 1]),
    _entry("DecoderMLP", DecoderMLP, hidden_size=16, n_hidden_layers=2),
)

"""Random networks: what is removed from them changes nothing."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from killing import difference, half_removed, watched
from random_networks import Builder, RandomNetwork, networks

from lightning_selfcompress.quantize.convert import convert


def check(network: RandomNetwork) -> None:
    convert(network)
    channels, watcher = watched(network, network.example)
    assert watcher.failures == []
    assert channels.unseen == ()
    smaller, _ = half_removed(network, channels)
    assert difference(network, smaller, network.example) < 1e-10


@given(networks())
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_a_random_network_stays_exact(network):
    """Channels of a random network go exactly or not at all, in training and in evaluation mode."""
    check(network)


@pytest.mark.nightly
@given(networks())
@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_many_random_networks_stay_exact(network):
    """The same for two thousand."""
    check(network)


def test_most_channels_are_removable():
    """Pinning everything would be exact, too: of random networks, more than half of the channels can go."""
    removable = producers = 0
    for seed in range(60):
        network = Builder(random.Random(seed).choice).build()
        convert(network)
        channels, _ = watched(network, network.example)
        removable += channels.removable().sum()
        producers += channels.produced().sum()
    assert removable > producers / 2

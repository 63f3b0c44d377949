"""Fixtures of the tools' tests."""

import pytest

from peers import NAMES, build_peers, why_missing


@pytest.fixture(scope="session")
def peers():
    """fcos_d2 and all other FCOS implementations that are installed, by name."""
    installed = [name for name in NAMES if not why_missing(name)]
    return {peer.name: peer for peer in build_peers(installed, 18, "cpu")}


@pytest.fixture(params=NAMES)
def pair(request, peers):
    """fcos_d2 and one other implementation."""
    reason = why_missing(request.param)
    if reason:
        pytest.skip(reason)
    return [peers["fcos_d2"], peers[request.param]]

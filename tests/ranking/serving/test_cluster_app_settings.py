"""What the Serve application is told: settings are read or refused, the example is one, and a deployment keeps its night."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from pathlib import Path

import pytest
import yaml

from index.publish import current, publish
from ranking.serving.cluster_app import SERVICER, ClusterAppError, ClusterSettings, application
from ranking.serving.cluster_app_parts import Ask, EncoderReplica, ShardReplica, far_stack

ROOT = Path(__file__).parents[3]
RAY = importlib.util.find_spec("ray") is not None


def test_settings_are_read_or_refused() -> None:
    told = ClusterSettings.read({"store": "s", "encoder": "e", "exact": "false", "most_rankers": "3", "timeout_s": 1})
    assert (told.exact, told.most_rankers, told.timeout_s, told.source.ranker) == (False, 3, 1.0, None)
    for wrong in (
        {"store": "s"},
        {**vars(told), "colour": "red"},
        {**vars(told), "most_rankers": "many"},
        {**vars(told), "exact": "so"},
    ):
        with pytest.raises(ClusterAppError):
            ClusterSettings.read(wrong)


def test_the_example_is_an_application() -> None:
    config = yaml.safe_load((ROOT / "examples/deploy/serve.yaml").read_text(encoding="utf-8"))
    (app,) = config["applications"]
    assert config["grpc_options"]["grpc_servicer_functions"] == [SERVICER]
    assert app["import_path"] == f"{application.__module__}:{application.__name__}"
    settings = ClusterSettings.read(app["args"])
    assert settings.ranker and config["grpc_options"]["request_timeout_s"] > settings.timeout_s, "our own word comes first"
    module, _, name = SERVICER.rpartition(".")
    assert callable(vars(importlib.import_module(module))[name])


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install() -> None:
    with pytest.raises(ClusterAppError, match=r"pip install 'brewline\[cluster\]'"):
        application({"store": "s", "encoder": "e"})


def test_a_replica_begun_after_the_next_night_is_of_the_deployed_one(night: Path, copied: Path) -> None:
    settings, deployed = ClusterSettings(str(copied), str(night / "encoder1")), current(copied)
    assert deployed is not None
    tomorrow = deployed.with_name(f"20990101-{deployed.name.partition('-')[2]}")
    shutil.copytree(deployed, tomorrow)
    assert publish(copied, tomorrow.name) == current(copied) != deployed

    def here(replica: object) -> Ask:
        return lambda method, *given: getattr(replica, method)(*given)

    asks = here(EncoderReplica(settings.encoder, 32)), [here(ShardReplica(str(deployed), 0, True))]
    far = far_stack(settings.source, deployed, *asks, None)
    far.probe()
    assert far.snapshot.name == deployed.name
    far.today.close()

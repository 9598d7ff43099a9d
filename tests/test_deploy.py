"""The files of deploy/ fit each other, the command line and the metrics. No container is built."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from typer.testing import CliRunner

from earlyfusion.cli import app

DEPLOY = Path(__file__).parent.parent / "deploy"


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and what follows them, lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [cast("tuple[str, str]", tuple(line.split(" ", 1))) for line in lines if line.strip()]


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def test_the_image_starts_the_server_and_copies_what_is_there() -> None:
    for instruction, rest in dockerfile():
        if instruction == "COPY":
            assert all((DEPLOY.parent / name).exists() for name in shlex.split(rest)[:-1]), rest
    [entry] = [json.loads(rest) for name, rest in dockerfile() if name == "ENTRYPOINT"]
    help_text = CliRunner().invoke(app, [*entry[1:-2], "--help"]).output
    requests = [*entry, *compose()["services"]["server"]["command"]]
    options = [word for word in requests if word.startswith("--")]
    assert options == ["--host", "--model"] and all(option in help_text for option in options)
    assert [rest for name, rest in dockerfile() if name == "USER"] == ["1000:1000"]


def test_the_files_that_are_mounted_exist_and_reach_each_other() -> None:
    services = compose()["services"]
    for name in ("prometheus", "grafana"):
        for mount in services[name]["volumes"]:
            assert (DEPLOY / mount.split(":")[0]).is_file(), mount
    [job] = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert job["authorization"]["credentials_file"] == "/run/secrets/api_key"
    assert compose()["secrets"] == {"api_key": {"environment": "EARLYFUSION_API_KEY"}}
    [source] = yaml.safe_load((DEPLOY / "grafana/datasource.yaml").read_text())["datasources"]
    assert source["uid"] == "prometheus" and source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text())["providers"]
    mounts = [mount.split(":")[1] for mount in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/earlyfusion.json" in mounts


def test_every_query_of_the_dashboard_asks_for_a_metric_that_is_there() -> None:
    pytest.importorskip("prometheus_client")
    from serve_case import running

    with running() as server:
        page = server.get("/metrics").text
    there = set(re.findall(r"^# TYPE (earlyfusion:\w+)", page, flags=re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana/earlyfusion.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"earlyfusion:\w+", query)}
    assert len(asked) >= 10
    assert {name.removesuffix("_bucket") for name in asked} <= there

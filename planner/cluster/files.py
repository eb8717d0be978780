"""A cluster as the text of its file: what `load_cluster` reads back to an equal cluster (docs/cluster-file.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Measured
from heteromesh.planner.model.method import Method


def cluster_toml(cluster: Cluster, comment: str = "") -> str:
    """Returns the file's text; `comment` becomes its first lines. Devices of the catalogue are only named."""
    blocks = ["".join(f"# {line}\n" for line in comment.splitlines()) + f"name = {_value(cluster.name)}"]
    for name, device in cluster.devices.items():
        if CATALOG.get(name) != device:
            blocks.append(f"[devices.{_value(name)}]\n{_lines(asdict(device))}")
    for _, equal in groupby(cluster.hosts, key=lambda host: replace(host, name="")):
        blocks.append("[[hosts]]\n" + _lines(_group(list(equal))))
    if cluster.measured != Measured():
        blocks += _measured(cluster.measured)
    return "\n\n".join(blocks) + "\n"


def _group(hosts: Sequence[Host]) -> dict[str, Any]:
    host = hosts[0]
    entry: dict[str, Any] = {"names": [h.name for h in hosts], "device": host.device, "count": host.count}
    if host.fabric:
        entry["fabric"] = host.fabric
    if host.memory_gb is not None:
        entry["memory_gb"] = host.memory_gb
    if host.nics:
        entry["nics"] = [asdict(nic) for nic in host.nics]
    return entry


def _measured(measured: Measured) -> list[str]:
    """Returns the [measured] table, then the tables in it; what was not measured is left out."""
    names = ("speeds", "latency_seconds", "nic_gbit", "link_gbps")
    table = {name: getattr(measured, name) for name in names if getattr(measured, name)}
    if measured.model:
        table["model"] = asdict(measured.model)
    rates: dict[int, float] = {}
    if measured.constants:
        constants = asdict(measured.constants)
        rates = constants.pop("bytes_per_second")
        table |= constants
    blocks = [f"[measured]\n{_lines(table)}"]
    if rates:
        blocks.append("[measured.bytes_per_second]\n" + _lines({str(d): r for d, r in rates.items()}))
    for method in measured.methods:
        usual = asdict(Method(name="", bytes_per_token=-1.0))
        unusual = {key: value for key, value in asdict(method).items() if value != usual[key]}
        blocks.append("[[measured.methods]]\n" + _lines(unusual))
    return blocks


def _lines(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{key} = {_value(value)}" for key, value in table.items())


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        assert math.isfinite(value)
        return f"{value:.6g}" if "." in f"{value:.6g}" or "e" in f"{value:.6g}" else f"{value:.1f}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value)  # TOML's basic strings have JSON's escapes
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    assert isinstance(value, Sequence)
    return "[" + ", ".join(map(_value, value)) + "]"

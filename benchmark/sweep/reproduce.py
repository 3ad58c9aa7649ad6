"""How to run one finished cell again: a config with its complete settings, and the commands. No torch here."""

from __future__ import annotations

from typing import Any

from dfqbench.sweep.cell import without_data
from dfqbench.yaml_file import write_yaml

BY_NAME = ("digits", "cifar10", "cifar100", "imagenet")  # evaluation sets that a name alone finds


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    """A sweep of one cell (see Sweep) from a cell's record; bits, seed and id are left as {bits}, {seed} and {id} for whoever fills them in."""
    task, card = record["identity"]["teacher"]["task"], record["teacher"]
    teacher = {"model": card["model"], "name": card["label"]}
    if card["weights"] not in ("zoo", "factory"):
        teacher["weights"] = "${TEACHER_WEIGHTS}"
    teacher |= {key: task[key] for key in ("classes", "size", "mean", "std", "crop_ratio", "interpolation")}
    name, selection = record["evaluation"]["name"], record["evaluation"].get("selection")
    on = {"evaluate": name if name in BY_NAME else {"set": "imagefolder:${EVALUATION_SET}", "name": name}}
    if without_data(record):
        on = {"evaluate": "none"} | ({"selection": selection} if selection else {})
    return {
        "name": "cell-{id}",
        "teachers": [teacher],
        **on,
        "methods": [{record["method"]: record["identity"]["config"] | {name: f"${{{name.upper()}}}" for name in record.get("files", {})}}],
        "bits": ["{bits}"],
        "seeds": ["{seed}"],
        "protocol": {"name": record["protocol"], **record["identity"]["protocol"]},
        "precision": record["precision"],
    }


def recipe(result: dict[str, Any]) -> str:
    """What to type, with {bits}, {seed} and {id} left open."""
    record, provenance = result["cell"], result["provenance"]
    config = config_of(record)
    lines = []
    if provenance.get("git"):
        commit = provenance["git"].rstrip("+")
        lines.append(f"git checkout {commit}" + ("   # and uncommitted changes on top of it" if provenance["git"].endswith("+") else ""))
    if "${TEACHER_WEIGHTS}" in str(config):
        lines.append(f"export TEACHER_WEIGHTS={record['teacher']['weights']}   # hash {record['teacher']['weights_sha256'][:16]}")
    for name, file in record.get("files", {}).items():
        lines.append(f"export {name.upper()}={file}   # sha256 {record['identity']['config'][name][:16]}")
    if "${EVALUATION_SET}" in str(config):
        lines.append(
            f"export EVALUATION_SET=path/to/images   # {record['evaluation']['images']} images, digest {record['identity']['evaluation'][:16]}"
        )
    text = write_yaml(config, default_flow_style=None, width=150).replace("'{seed}'", "{seed}").replace("'{bits}'", "{bits}")
    lines += ["cat > cell.yaml <<'END'", text.rstrip(), "END"]
    plugin = str(record.get("plugin", ""))
    extra = "" if plugin.startswith("built in") or not plugin else f" --plugin FILE   # the method came from {plugin}"
    threads = f" --threads {provenance['threads']}" if provenance.get("device") == "cpu" and provenance.get("threads") else ""
    return "\n".join([*lines, f"dfqbench run cell.yaml --device {provenance.get('device', 'auto')}{threads}{extra}"])

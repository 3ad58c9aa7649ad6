"""How to run one finished cell again: a config with its complete settings, and the commands. No torch here."""

from __future__ import annotations

from typing import Any

from dfqbench.quantization import Bits
from dfqbench.sweep.cell import without_data
from dfqbench.yaml_file import write_yaml

BY_NAME = ("digits", "digit-scenes-segment", "digit-scenes-detect", "cifar10", "cifar100", "imagenet")  # evaluation sets that a name alone finds


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    """A sweep of one cell (see Sweep) from a cell's record; bits, seed and id are left as {bits}, {seed} and {id} for whoever fills them in."""
    task, card = record["identity"]["teacher"]["task"], record["teacher"]
    teacher = {"model": card["model"], "name": card["label"]}
    if card["weights"] not in ("zoo", "factory"):
        teacher["weights"] = "${TEACHER_WEIGHTS}"
    teacher |= {key: task[key] for key in ("classes", "size", "mean", "std", "crop_ratio", "interpolation")}
    selection = record["evaluation"].get("selection")
    on: dict[str, Any] = {"evaluate": _evaluation_set(record["evaluation"])}
    if without_data(record):
        on = {"evaluate": "none"} | ({"selection": selection} if selection else {})
    bits: Any = "{bits}"
    if chosen := record["identity"].get("widths"):
        average = Bits.parse(record["bits"], average=True)
        bits = {"average_weight_bits": average.weights, "activations": average.activations, "allocate": {chosen["allocator"]: chosen["settings"]}}
        bits |= {"allocate_activations": True} if chosen.get("activations") else {}
        on["allocation"] = record["allocation"]["pool"]
    settings = record["identity"]["config"] | {name: f"${{{name.upper()}}}" for name in record.get("files", {})}
    if real := settings.pop("yardstick", None):
        on["yardsticks"] = {settings["host"]: {"images": "${YARDSTICK}", "count": real["count"]}}
    return {
        "name": "cell-{id}",
        "teachers": [teacher],
        **on,
        "methods": [{record["method"]: settings}],
        "bits": [bits],
        "seeds": ["{seed}"],
        "protocol": {"name": record["protocol"], **record["identity"]["protocol"]},
        "precision": record["precision"],
    }


def _evaluation_set(card: dict[str, Any]) -> str | dict[str, str]:
    """As a config names it. ${EVALUATION_SET} stands for its place; for kind and place where an earlier version noted no more than a name."""
    name, given = card["name"], card.get("set", "")
    if not given:
        given = next((known for known in (*BY_NAME, "imagefolder:") if name == known or (known.endswith(":") and name.startswith(known))), "")
    given = given.removesuffix(":") if given.removesuffix(":") in BY_NAME else given
    text = given if given and not given.endswith(":") else given + "${EVALUATION_SET}"
    return text if text == name else {"set": text, "name": name}


def _code_of_others(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(a line that says what is needed besides this suite, the plug-in's file or "" for an installed package), each once."""
    needed: dict[str, tuple[str, str]] = {}
    for what, source in (("method", record.get("source")), ("evaluation set", record["evaluation"].get("source"))):
        if source and source["package"] not in ("", "dfqbench"):
            needed.setdefault(source["package"], (f"pip install {source['package']}=={source['version']}   # has the {what}", ""))
        elif source and not source["package"]:
            needed.setdefault(source["sha256"], (f"# {source['file']} has the {what}, sha256 {source['sha256'][:16]}", source["file"]))
    plugin = str(record.get("plugin", ""))
    if not record.get("source") and plugin and not plugin.startswith("built in"):
        needed[plugin] = f"# FILE has the method, which came from {plugin}", "FILE"
    return list(needed.values())


def recipe(result: dict[str, Any]) -> str:
    """What to type, with {bits} (where all tensors have the same), {seed} and {id} left open."""
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
        place = "path/to/images" if ":${EVALUATION_SET}" in str(config) else "imagefolder:path/to/images"
        said = f"{record['evaluation']['images']} images, digest {record['identity']['evaluation'][:16]}"
        lines.append(f"export EVALUATION_SET={place}   # {said}" + ("; or another set's name" if ":" in place else ""))
    if real := record["identity"]["config"].get("yardstick"):
        lines.append(f"export YARDSTICK=imagefolder:path/to/images   # real images, not the test images; digest {real['digest'][:16]}")
    text = write_yaml(config, default_flow_style=None, width=150).replace("'{seed}'", "{seed}").replace("'{bits}'", "{bits}")
    lines += ["cat > cell.yaml <<'END'", text.rstrip(), "END"]
    code = _code_of_others(record)
    lines += [line for line, _ in code]
    extra = "".join(f" --plugin {file}" for _, file in code if file)
    threads = f" --threads {provenance['threads']}" if provenance.get("device") == "cpu" and provenance.get("threads") else ""
    return "\n".join([*lines, f"dfqbench run cell.yaml --device {provenance.get('device', 'auto')}{threads}{extra}"])

"""Reads `docs/defaults.md`: where each default of the configuration classes comes from."""

import re
from pathlib import Path

from modeling_latentforge import (
    LatentForgeAutoencoderConfig,
    LatentForgeConfig,
    LatentForgeIdeaConfig,
    LatentForgeWireConfig,
)
from modeling_latentforge.configuration_latentforge import LatentHeadConfig


CONFIGS = (
    LatentForgeConfig,
    LatentHeadConfig,
    LatentForgeAutoencoderConfig,
    LatentForgeWireConfig,
    LatentForgeIdeaConfig,
)
# parts, and ids that only a tokenizer knows
NO_DEFAULTS = {
    *("backbone_config", "autoencoder_config", "head_config", "encoder_config", "bridges"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}
# what a source must be: a table here, a paper or the model that the field is of, a size, or that there is none
SOURCES = (
    *("](experiments.md#", "CALM", "ARC-Encoder", "LatentWire", "the first model"),
    *("a size", "a convention", "not measured"),
)


def faults(docs: Path) -> list[str]:
    """What `defaults.md` in this folder leaves out or gets wrong, a line each."""
    headings = {anchor(line) for line in (docs / "experiments.md").read_text(encoding="utf-8").splitlines()}
    sections = re.split(r"^## (\w+)\n", (docs / "defaults.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables = dict(zip(sections[1::2], sections[2::2], strict=True))
    found = []
    for config in CONFIGS:
        lines = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", tables.get(config.__name__, ""), re.MULTILINE)
        told = {name: (value, source) for name, value, source in lines}
        fields = {name: getattr(config, name) for name in config.__annotations__ if name not in NO_DEFAULTS}
        for name in told.keys() - fields.keys():
            found.append(f"{config.__name__} has no field {name}")
        for name, value in fields.items():
            if name not in told:
                found.append(f"{config.__name__}.{name} is missing")
                continue
            written, source = told[name]
            if written != str(value):
                found.append(f"{config.__name__}.{name} is {value}, and the page says {written}")
            if not any(kind in source for kind in SOURCES) and not source.startswith("as `"):
                found.append(f"{config.__name__}.{name} has no source")
            for link in re.findall(r"\]\(experiments\.md#([^)]*)\)", source):
                if link not in headings:
                    found.append(f"{config.__name__}.{name}: experiments.md has no heading #{link}")
    return found


def anchor(heading: str) -> str:
    """The fragment that a Markdown reader gives a heading; empty for any other line."""
    if not heading.startswith("#"):
        return ""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")

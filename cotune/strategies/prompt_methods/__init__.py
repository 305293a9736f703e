"""The table of prompt methods, imported on demand."""

from __future__ import annotations

METHODS = {
    "opro": "cotune.strategies.prompt_methods.opro:Opro",
    "bootstrap": "cotune.strategies.prompt_methods.bootstrap:Bootstrap",
    "opro+bootstrap": "cotune.strategies.prompt_methods.opro_bootstrap:OproBootstrap",
    "rlprompt": "cotune.strategies.prompt_methods.rlprompt:Rlprompt",
    "bpo": "cotune.strategies.prompt_methods.bpo:Bpo",
    "mipro": "cotune.strategies.prompt_methods.mipro:Mipro",
    "cfpo": "cotune.strategies.prompt_methods.cfpo:Cfpo",
    "gepa": "cotune.strategies.prompt_methods.gepa:Gepa",
}

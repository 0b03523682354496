"""Weights as Hugging Face lays them out, read into our models and written back, bit for bit.

    config, params = load_bart("folder")      # config.json and model.safetensors, whole or in shards
    EncoderDecoder(config).apply({"params": params}, ContextTokens(tokens, mask), method="prefill")
    save_bart("other", config, params)

`load("folder")` reads any family, by the model_type in its config.json.
"""

from jaxrec.models.huggingface.bart import load_bart, save_bart
from jaxrec.models.huggingface.config_json import CONFIG_FILE
from jaxrec.models.huggingface.families import load
from jaxrec.models.huggingface.qwen import load_qwen2, load_qwen3, save_qwen2, save_qwen3
from jaxrec.models.huggingface.t5 import load_t5, save_t5

__all__ = [
    "CONFIG_FILE",
    "load",
    "load_bart",
    "load_qwen2",
    "load_qwen3",
    "load_t5",
    "save_bart",
    "save_qwen2",
    "save_qwen3",
    "save_t5",
]

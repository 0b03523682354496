"""Weights as Hugging Face lays them out, read into our models and written back, bit for bit.

config, params = load_t5("folder")          # config.json and model.safetensors, whole or in shards
EncoderDecoder(config).apply({"params": params}, ContextTokens(tokens, mask), method="prefill")
save_t5("other", config, params)
"""

from jaxrec.models.huggingface.config_json import CONFIG_FILE
from jaxrec.models.huggingface.qwen import load_qwen2, save_qwen2
from jaxrec.models.huggingface.t5 import load_t5, save_t5

__all__ = ["CONFIG_FILE", "load_qwen2", "load_t5", "save_qwen2", "save_t5"]

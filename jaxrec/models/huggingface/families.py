"""A folder of any family in Hugging Face's layout."""

from pathlib import Path

from jaxrec.models.causal import CausalConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.huggingface.bart import load_bart
from jaxrec.models.huggingface.config_json import read_config
from jaxrec.models.huggingface.qwen import load_qwen2, load_qwen3
from jaxrec.models.huggingface.t5 import load_t5

LOADERS = {"bart": load_bart, "mt5": load_t5, "qwen2": load_qwen2, "qwen3": load_qwen3, "t5": load_t5}


def load(folder: str | Path) -> tuple[EncoderDecoderConfig | CausalConfig, dict]:
    """The configuration and the parameters (float32) of a folder, by the model_type that its config.json names.

    Raises:
      UserError: the family is another, or as for its loader.
    """
    return LOADERS[read_config(Path(folder), *LOADERS)["model_type"]](folder)

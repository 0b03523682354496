"""One vocabulary of text tokens and codes: logits of levels, with a bias of the head, and tokens put behind others."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.causal import Causal
from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxrec.models.huggingface import load, load_bart, save_bart
from jaxrec.models.vocabulary import ContextTokens, grow_vocabulary, level_log_probs, level_logits

GOLDEN = Path(__file__).parent / "golden" / "models"
MORE = 9


def test_logits_of_a_level_with_a_bias_by_hand():
    """Two states of one width; level 1 has the tokens 2 and 3."""
    table, bias = jnp.array([[9.0], [9.0], [1.0], [-1.0], [2.0]]), jnp.array([7.0, 7.0, 0.5, 1.0, 0.0])
    state, levels = jnp.array([[1.0], [0.0]]), ((0, 2), (2, 2))
    logits, log_z = level_logits(table, state, 1, levels, True, bias)
    np.testing.assert_allclose(logits, [[1.5, 0.0], [0.5, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(log_z, np.log(np.exp([[1.5, 0.0], [0.5, 1.0]]).sum(1)), rtol=1e-6)
    whole, log_z = level_logits(table, state, 1, levels, False, bias)
    np.testing.assert_array_equal(whole, logits)
    np.testing.assert_allclose(log_z[1], np.log(np.exp(bias).sum()), rtol=1e-6)
    np.testing.assert_allclose(
        level_log_probs(table, state, 1, None, True, bias=bias)[1], bias - np.log(np.exp(bias).sum()), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["bart_tied", "t5_gated_untied", "qwen2_tied"])
def test_tokens_behind_a_models_own_leave_the_logits_of_those_as_they_are(name):
    config, params = load(GOLDEN / name)
    grown, more = grow_vocabulary(config, params, MORE, jax.random.key(0))
    assert grown == dataclasses.replace(config, vocabulary=config.vocabulary + MORE)
    kind = EncoderDecoder if isinstance(config, EncoderDecoderConfig) else Causal
    inputs = ContextTokens(jnp.array([[3, 5, 7]]), jnp.ones((1, 3), bool))

    def first(config, params):
        """Log-probabilities of a target's first token, those of the model's own tokens normalised by themselves."""
        model = kind(dataclasses.replace(config, levels=((0, 40),)))
        context = model.apply({"params": params}, inputs, method="prefill")
        return model.apply({"params": params}, context, None, None, 0, method="extend")[0]

    np.testing.assert_allclose(first(config, params), first(grown, more), atol=1e-6)
    for table in {"embed", "head"} & set(params):
        old, new = params[table]["table"], more[table]["table"]
        assert new.dtype == old.dtype
        assert new.shape == (40 + MORE, 16)
        np.testing.assert_array_equal(new[:40], old)
        away = (new[40:] - old.mean(0)) / old.std(0)
        assert 0.05 < away.std() < 0.15
        assert len(np.unique(new, axis=0)) == 40 + MORE
    assert grow_vocabulary(config, params, 0, jax.random.key(0))[0] == config


def test_a_bart_with_codes_behind_its_text_is_saved_and_read(tmp_path):
    config, params = grow_vocabulary(*load_bart(GOLDEN / "bart_tied"), MORE, jax.random.key(1))
    assert params["logits_bias"][:40].all()
    assert not params["logits_bias"][40:].any()
    config = dataclasses.replace(config, levels=((40, 4), (44, 5)))
    save_bart(tmp_path, config, params)
    again, read = load_bart(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_fewer_than_no_tokens_are_refused():
    with pytest.raises(ValueError, match="more is -1"):
        grow_vocabulary(*load_bart(GOLDEN / "bart_tied"), -1, jax.random.key(0))

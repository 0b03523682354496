"""Token sequences as fixed-shape arrays."""

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.token_sequences import TokenSequenceConfig


@pytest.mark.parametrize("buckets", [(4,), (2, 4), (1, 3, 8)])
@pytest.mark.parametrize("length", range(11))
def test_a_sequence_is_padded_to_its_bucket_and_loses_its_oldest_tokens(buckets, length):
    config, tokens = TokenSequenceConfig(buckets), np.arange(5, 5 + length)
    arrays = config.cut({"tokens": tokens}, 0, behaviors=3, wanted=np.ones(3, bool))
    size = min([size for size in buckets if size >= length], default=buckets[-1])
    kept = tokens.tolist()[max(length - size, 0) :]
    assert arrays["tokens"].tolist() == kept + [0] * (size - len(kept)) and arrays["tokens"].dtype == np.int32
    assert arrays["mask"].tolist() == [True] * len(kept) + [False] * (size - len(kept))
    assert config.bucket_of({"tokens": tokens}, 0) == size


def test_a_history_without_tokens_is_padding():
    arrays = TokenSequenceConfig((3, 5)).cut({"item": np.arange(9)}, 9, behaviors=1, wanted=np.ones(1, bool))
    assert arrays["tokens"].tolist() == [0, 0, 0] and not arrays["mask"].any()


@pytest.mark.parametrize("buckets", [(), (0,), (4, 2), (3, 3)])
def test_buckets_rise(buckets):
    with pytest.raises(UserError, match=r"configuration key 'features.buckets' is .*; give rising lengths"):
        TokenSequenceConfig(buckets)

"""Names of the rows of packed arrays: everything that a step reads arrives in a few arrays; see `runner.batch`."""

from enum import IntEnum, IntFlag


class TokenField(IntEnum):
    """Rows of `ForwardBatch.tokens_4T`.

    Attributes:
        ID: the token id, or `-1 - row` for the token that the step before samples for that row.
        POSITION: its position in the sequence.
        CACHE_SLOT: where its key and value go; past the end of the pool for padding.
        LORA_SLOT: the slot of its adapter; 0 for none.
    """

    ID = 0
    POSITION = 1
    CACHE_SLOT = 2
    LORA_SLOT = 3


class RowField(IntEnum):
    """Rows of `ForwardBatch.rows_4B`.

    Attributes:
        KV_LEN: tokens of the sequence once the step has run.
        Q_END: the end of the row's tokens among the packed ones.
        NUM_DECODE: at index 0, how many rows run a single token.
        NUM_ROWS: at index 0, how many rows there are.
    """

    KV_LEN = 0
    Q_END = 1
    NUM_DECODE = 2
    NUM_ROWS = 3


class SampleField(IntEnum):
    """Rows of `SampleBatch.ints_8B`.

    Attributes:
        TOKEN_INDEX: the packed token whose logits are computed.
        STATE_ROW: the row of device state that sampling reads.
        WRITE_ROW: the row of device state that takes the token; past the end to drop it.
        TARGET: a token to report instead of sampling one, or -1.
        POSITION: position of the new token, which keys its noise.
        TOP_K: keep so many tokens.
        FLAGS: see `SampleFlag`.
        LORA_SLOT: the slot of the row's adapter; 0 for none.
    """

    TOKEN_INDEX = 0
    STATE_ROW = 1
    WRITE_ROW = 2
    TARGET = 3
    POSITION = 4
    TOP_K = 5
    FLAGS = 6
    LORA_SLOT = 7


class SampleFlag(IntFlag):
    """Bits of `SampleField.FLAGS`.

    Attributes:
        BIASED: the row has logit biases.
        FORBID_STOPS: end tokens are forbidden.
        LOGPROBS: log-probabilities are wanted.
    """

    BIASED = 1
    FORBID_STOPS = 2
    LOGPROBS = 4

"""Names of the rows of the packed arrays that hold a step's inputs; see `runner.batch`."""

from enum import IntEnum, IntFlag


class TokenField(IntEnum):
    """Rows of `ForwardBatch.tokens_4T`.

    Attributes:
        ID: the token id, or `-1 - row` for the token that the previous step samples for that row.
        POSITION: its position in the sequence.
        CACHE_SLOT: the cache slot for its key and value; past the end of the pool for padding.
        LORA_SLOT: the slot of its adapter; 0 for none.
    """

    ID = 0
    POSITION = 1
    CACHE_SLOT = 2
    LORA_SLOT = 3


class RowField(IntEnum):
    """Rows of `ForwardBatch.rows_4B`.

    Attributes:
        KV_LEN: number of cached tokens of the sequence after the step.
        Q_END: end of the row's tokens among the packed tokens.
        NUM_DECODE: at index 0, the number of rows that run a single token.
        NUM_ROWS: at index 0, the number of rows.
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
        WRITE_ROW: the row of device state that the token is written to; past the end to drop it.
        TARGET: a token to report instead of sampling one, or -1.
        POSITION: position of the new token, from which its sampling noise is derived.
        TOP_K: number of tokens that top-k keeps.
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
        FORBID_STOPS: end-of-sequence and stop tokens are forbidden.
        LOGPROBS: log-probabilities are requested.
    """

    BIASED = 1
    FORBID_STOPS = 2
    LOGPROBS = 4

"""Settings of a representation: what becomes of an example as a vector."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from curate.config import STRICT
from curate.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """One way to make a vector of each example."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["model", "ngrams", "column", "values"] = "model"
    """Hidden states of a transformers model; hashed n-grams of the text, without any model; a
    column of vectors in the input; or the numbers or pixels of the examples as they are."""
    model: str | None = None
    """Of `model`: folder or hub id; a sentence encoder, or any other. By default `model.name`."""
    revision: str | None = None
    """Of a hub id: commit, tag or branch."""
    pooling: Literal["auto", "mean", "position_weighted", "first", "last"] = "auto"
    """Of `model`: how the tokens' states become one vector. `auto` is what a sentence encoder's
    own files say; else weights that grow with the position for models that read from left to
    right, and the mean for others."""
    layer: int = -1
    """Of `model`: whose states; -1 is the last layer, 0 the embeddings."""
    prefix: str = ""
    """Of `model`: put before every text; some encoders are trained with one."""
    max_tokens: int = 256
    """Of `model`: longer texts are cut here."""
    batch_tokens: int = 16_384
    """Of `model`: tokens of a batch, padding included."""
    column: str | None = None
    """Of `column`: the input column with a list of numbers for each row."""
    dim: int = 1024
    """Of `ngrams`: dimensions, into which n-grams are hashed with a sign."""
    ngrams: tuple[int, int] = (1, 2)
    """Of `ngrams`: shortest and longest run of words or characters."""
    words: Literal["words", "characters"] = "words"
    """Of `ngrams`: what is counted; characters are for languages without spaces."""
    normalize: bool = True
    """Whether vectors are scaled to length 1, so that their inner product is the cosine."""
    dtype: Literal["float32", "float16"] = "float32"
    """As which they are stored."""

    def __post_init__(self) -> None:
        if (self.column is None) == (self.kind == "column"):
            raise ConfigError(
                "kind: column and column: NAME go together", fix="give both, or neither"
            )
        if not 1 <= self.ngrams[0] <= self.ngrams[1]:
            raise ConfigError(f"ngrams is {list(self.ngrams)}", fix="write [1, 2]")
        if min(self.max_tokens, self.batch_tokens, self.dim) < 1:
            raise ConfigError(
                "max_tokens, batch_tokens and dim must be positive",
                fix="remove them to use the defaults",
            )

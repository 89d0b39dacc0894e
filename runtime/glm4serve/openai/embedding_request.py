"""The body of a request for embeddings, and the form of the answer."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import Field

from glm4serve.embedder import Embedder, Embeddings
from glm4serve.openai.fields import PassedOver
from glm4serve.schema import Items

_MOST_INPUTS = 2048  # OpenAI's

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[Items[int], Field(min_length=1)]


class EmbeddingRequest(PassedOver):
    """OpenAI's without ``dimensions``: all of a model's numbers belong together."""

    model: str | None = Field(None, max_length=256)
    input: (
        Text
        | Ids
        | Annotated[Items[Text], Field(min_length=1, max_length=_MOST_INPUTS)]
        | Annotated[Items[Ids], Field(min_length=1, max_length=_MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None

    def texts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [list(self.input)]
        return list(self.input)

    def answer(self, embedder: Embedder, found: Embeddings) -> dict[str, Any]:
        """A list of them, in the texts' order. base64: of little-endian float32."""
        as_text = self.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row.tolist(),
            }
            for index, row in enumerate(found.rows)
        ]
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        return {"object": "list", "data": data, "model": embedder.name, "usage": usage}

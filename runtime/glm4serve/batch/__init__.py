"""Files of requests in OpenAI's batch format, answered without a server; a run that was killed is gone on with.

Each line of the requests' file is ``{"custom_id", "method": "POST", "url", "body"}``, each line of the answers'
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``. Bodies are read, and answers made,
by the same code as the service's: :mod:`glm4serve.openai`.
"""

from glm4serve.batch.answers import AnswersFile, identity_of
from glm4serve.batch.requests import Left, compare
from glm4serve.batch.window import Progress, answer_all

__all__ = ["AnswersFile", "Left", "Progress", "answer_all", "compare", "identity_of"]

"""Chat templates: a conversation as the text that a model was trained on, by the Jinja template beside its tokenizer.

Templates are programs of strangers. They run in Jinja's sandbox, without access to Python, on plain data; neither their
time nor their memory is bounded. Helpers and settings are those that templates are written for, of Hugging Face:
https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]


def render_chat(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """Renders a conversation.

    Args:
      template: in Jinja's language.
      messages: `{"role": …, "content": …}` and what else the template knows; entries that are None are left out.
      **variables: what else it may ask for, such as `add_generation_prompt`, `tools`, `bos_token`.

    Returns:
      The text.

    Raises:
      ValueError: if the messages are not plain data, or the template fails or refuses them.
    """
    if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ValueError("messages must be one or more of {'role': 'user', 'content': 'a text'}")
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        # The round trip leaves nothing with methods that might be called.
        data = json.loads(json.dumps({**variables, "messages": present}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages and variables of a chat template must be plain JSON data: {error}") from error
    try:
        return _ENVIRONMENT.from_string(template).render(data)
    except Exception as error:  # a template can raise anything that an expression can
        raise ValueError(f"the chat template cannot render this conversation: {error}") from error


class _Generation(Extension):
    """The tags `{% generation %} … {% endgeneration %}`, which mark what the model says and leave no trace."""

    tags = {"generation"}  # noqa: RUF012, as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns what stands between the tags."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    """Lets a template refuse a conversation."""
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    """Lets a template write today's date."""
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, **settings: Any) -> str:
    """Writes JSON as it is, where Jinja's own filter would write it for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **settings})


def _make_environment() -> ImmutableSandboxedEnvironment:
    """Makes the sandbox."""
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


_ENVIRONMENT = _make_environment()

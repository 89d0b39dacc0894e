"""Conversations to prompts.

A checkpoint brings its own Jinja template, which is not trusted: it runs in a process of its own, under limits, and
sees plain JSON values only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from glm4runtime.contract import CHAT_TEMPLATE, TOKENIZER_CONFIG, UserError
from glm4runtime.text.answers import ToolCall, parse_tool_calls, split_answer, split_thought
from glm4runtime.text.files import text_of
from glm4runtime.text.messages import check_all_shown, in_template_s_form
from glm4runtime.text.template_process import TemplateProcess

__all__ = ["ChatTemplate", "ToolCall", "parse_tool_calls", "split_answer", "split_thought"]

# The keys of tokenizer_config.json that transformers hands to templates as variables.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A Jinja chat template, compiled once, in a process of its own that ends with this object.

    Compiling and rendering have limits of time and memory: see :mod:`glm4runtime.text.template_process`.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        """Compile ``source``. ``variables`` are passed at each rendering, unless that one gives its own.

        Raises:
            UserError: the template has a syntax error, or passes a limit.
        """
        self.source = source
        self._variables = dict(variables or {})
        self._process = TemplateProcess(source)

    @classmethod
    def from_files(cls, folder: Path, files: Mapping[str, bytes], source: str | None = None) -> ChatTemplate:
        """The template of ``folder``, whose files are already read: chat_template.jinja, else tokenizer_config.json's.

        files: their bytes by name. source: a template in place of theirs. Raises UserError where there is none, or a
        file is not what it should be.
        """
        config_file = folder / TOKENIZER_CONFIG
        config: Any = {}
        if TOKENIZER_CONFIG in files:
            try:
                config = json.loads(text_of(files, TOKENIZER_CONFIG, folder))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{config_file}: not valid JSON: {error}") from error
            if not isinstance(config, dict):
                raise UserError(f"{config_file}: expected a JSON object, found {type(config).__name__}")
        if source is None:
            source = text_of(files, CHAT_TEMPLATE, folder) if CHAT_TEMPLATE in files else config.get("chat_template")
        if source is None:
            raise UserError(
                f'{folder}: no chat_template.jinja, and no "chat_template" in a tokenizer_config.json; '
                "give one (chat_template=, --chat-template), or a prompt instead of messages (--raw)"
            )
        if not isinstance(source, str):
            raise UserError(f'{config_file}: "chat_template": expected a string, found {type(source).__name__}')
        # A token is written as its text or as {"content": text, ...}.
        tokens = {key: config.get(key) for key in _SPECIAL_TOKENS}
        tokens = {key: token.get("content") if isinstance(token, dict) else token for key, token in tokens.items()}
        return cls(source, {key: token for key, token in tokens.items() if isinstance(token, str)})

    def close(self) -> None:
        """End the template's process; rendering raises UserError from then on."""
        self._process.close()

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt's text; encode it without adding special tokens.

        Args:
            messages: dicts with at least a "role" string; JSON values throughout. Tool calls and their results may have
                OpenAI's form where the template reads GLM's own only (``metadata``, ``observation``).
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: anything else that the template reads.

        Raises:
            UserError: the arguments are not as above; the template failed (its own ``raise_exception`` included) or
                passed a limit; or it leaves a message out, or a part of one, so that the model wouldn't see it.
        """
        _check_dicts("messages", messages)
        for i, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise UserError(f'messages[{i}]["role"]: expected a string, found {message.get("role")!r}')
        if tools is not None:
            _check_dicts("tools", tools)
        try:
            # Copies: what the process gets is plain, and what is rewritten is not the caller's.
            given = {key: _plain(value, key) for key, value in {**self._variables, **variables}.items()}
            plain, plain_tools = _plain(messages, "messages"), _plain(tools, "tools")
        except RecursionError as error:
            raise UserError("messages, tools or variables nest without end") from error
        given.setdefault("documents", None)
        given["add_generation_prompt"] = add_generation_prompt

        def show(messages: Sequence[dict[str, Any]], tools: Any = plain_tools) -> str:
            return self._process.render({**given, "messages": messages, "tools": tools})

        turns = in_template_s_form(plain, self._process.names, show, bool(self.own_tools))
        shaped = [turn.message for turn in turns]
        text = show(shaped)
        check_all_shown(turns, text, show)
        if plain_tools and show(shaped, None) == text:
            own = ", ".join(tool["name"] for tool in self.own_tools)
            raise UserError(
                "tools: the chat template leaves them out, so the model wouldn't know of them"
                + (f"; it has tools of its own ({own}), and needs none" if own else "")
            )
        return text

    @cached_property
    def own_tools(self) -> list[dict[str, Any]]:
        """Tools that the template itself tells the model of, as GLM-Z1-Rumination's search, click, open and finish.

        They are a JSON list of functions with ``name`` and ``parameters`` in the prompt of an empty conversation; []
        for others, and for templates that take tools.
        """
        if "tools" in self._process.names or '"parameters"' not in self.source:
            return []
        try:
            text = self._process.render({**self._variables, "messages": [], "tools": None})
        except UserError:
            return []
        for start in re.finditer(r'\[\s*\{\s*"name"', text):
            try:
                tools, _ = json.JSONDecoder().raw_decode(text, start.start())
            except (ValueError, RecursionError):
                continue
            if all(
                isinstance(tool, dict) and isinstance(tool.get("name"), str) and "parameters" in tool for tool in tools
            ):
                return list(tools)
        return []


def _check_dicts(name: str, values: Any) -> None:
    if not isinstance(values, list | tuple):
        raise UserError(f"{name}: expected a list of dicts, found {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{name}[{i}]: expected a dict, found {type(value).__name__}")


def _plain(value: Any, where: str) -> Any:
    """A copy of ``value`` in plain JSON types; anything else might have methods that the sandbox takes for harmless."""
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in _SCALARS:
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, dict):
        return {_plain(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise UserError(f"{where}: expected a JSON value, found {type(value).__name__}")


# The base type's own conversion, so that a subclass (a str enum, say) is stripped of what it adds.
_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)

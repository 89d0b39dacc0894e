"""Chat templates against transformers' rendering, and the parsing of answers."""

from __future__ import annotations

import copy
import enum
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from glm4runtime.contract import UserError
from glm4runtime.text.answers import read_call
from glm4runtime.text.chat import ChatTemplate, ToolCall, parse_tool_calls, split_thought
from glm4runtime.text.files import read_text_files

# In the manner of GLM-4-0414's own: tools in a Chinese system turn, calls behind <|assistant|>, old thoughts cut.
GLM4 = """\
[gMASK]<sop>
{%- if tools -%}
<|system|>
# 可用工具
{% for tool in tools %}
    {%- set function = tool.function if tool.get("function") else tool %}

## {{ function.name }}

{{ function | tojson(indent=4, ensure_ascii=False) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
{%- endfor %}
{%- endif -%}

{%- for message in messages %}
    {%- if message.role == 'system' %}
<|system|>
{{ message.content }}
    {%- elif message.role == 'user' %}
<|user|>
{{ message.content }}
    {%- elif message.role == 'assistant' and message.get("metadata") %}
<|assistant|>{{ message.metadata }}
{{ message.content }}
    {%- elif message.role == 'assistant' %}
<|assistant|>
{{ message.content.split('</think>')[-1].strip() }}
        {%- for call in message.tool_calls or [] %}
<|assistant|>{{ call.function.name }}
{{ call.function.arguments | tojson }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
<|observation|>
{{ message.content }}
    {%- else %}
        {{- raise_exception("不认识的 role: " ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking %}

<think>{% endif %}{% endif %}
"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查询某城市的天气 <b>& 'more'</b>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "城市"}}},
    },
}
ASK = {"role": "user", "content": '今天北京天气怎么样 <tag> & "quotes"?'}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [],
    [ASK],
    [
        {"role": "system", "content": "你是一个助手。"},
        ASK,
        {"role": "assistant", "content": "<think>嗯</think>\n\n晴。"},
        ASK,
    ],
    [ASK, {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'}],
    [
        ASK,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "北京", "days": 3}}}],
        },
        {"role": "tool", "content": '{"温度": 21}\n  indented  \n'},
    ],
]
FEATURES = {
    "generation tag": "{% for m in messages %}{% generation %}\n  {{ m.content }}\n{% endgeneration %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "namespace(self=)": "{% set ns = namespace(self=1) %}{{ ns.self }}",
    "dict": "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['a']) | tojson }}",
    "tojson": "{{ messages | tojson }}",
    "tojson arguments": "{{ messages | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "tojson indent": "{{ messages | tojson(indent=2) }}",
    "blocks": "  {% if messages %}\n    a\n  {% endif %}\n\n  {# c #}\n b \n\n",
    "undefined": "[{{ nothing }}{{ messages[9].x if messages[9] }}]",
    "documents": "{{ documents is none }} {{ tools is none }} {{ add_generation_prompt }}",
}


def reference(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    rendered, _ = render_jinja_template(conversations=[messages], chat_template=source, **kwargs)
    assert isinstance(rendered[0], str)
    return rendered[0]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [], [WEATHER], [WEATHER["function"], WEATHER]])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}])
def test_renders_as_transformers_does(messages: Any, tools: Any, variables: dict[str, Any]) -> None:
    template = ChatTemplate(GLM4)
    for prompt in (True, False):
        expected = reference(GLM4, messages, tools=tools, add_generation_prompt=prompt, **variables)
        assert template.render(messages, tools, prompt, **variables) == expected
    assert expected.startswith("[gMASK]<sop>")
    assert ("# 可用工具" in expected) == bool(tools)


@pytest.mark.parametrize("source", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_environment_is_transformers_s(source: str, messages: Any) -> None:
    source += "{{ messages }}"  # a prompt without a word of them would be refused
    # Thoughts of earlier turns, which such a template wouldn't leave out itself, are no part of it.
    shown = [{**message, "content": message["content"].rpartition("</think>\n\n")[2]} for message in messages]
    assert ChatTemplate(source).render(messages) == reference(source, shown, add_generation_prompt=True)


def test_tojson_does_not_escape_html() -> None:
    text = ChatTemplate("{{ messages[0].content | tojson }}").render([{"role": "user", "content": "<你> & '"}])
    assert text == '"<你> & \'"'


def test_strftime_now() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) in (
        str(datetime.now().year - 1),
        str(datetime.now().year),
    )


def test_variables_given_once_and_at_rendering() -> None:
    template = ChatTemplate("{{ a }}{{ b }}", {"a": 1, "b": 2})
    assert template.render([]) == "12"
    assert template.render([], b=3) == "13"


class Role(str, enum.Enum):
    USER = "user"


def test_subclasses_of_json_types_are_made_plain() -> None:
    assert (
        ChatTemplate("{{ messages[0].role }} {{ n }}").render([{"role": Role.USER}], n=(True, 1.5))
        == "user (True, 1.5)"
    )


@pytest.mark.parametrize(
    "messages, tools, message",
    [
        ("hi", None, "messages: expected a list of dicts, found str"),
        ({"role": "user"}, None, "messages: expected a list of dicts, found dict"),
        ([ASK, "hi"], None, r"messages\[1\]: expected a dict, found str"),
        ([{"content": "hi"}], None, r'messages\[0\]\["role"\]: expected a string, found None'),
        ([{"role": 3}], None, r'messages\[0\]\["role"\]: expected a string, found 3'),
        ([ASK], {"name": "f"}, "tools: expected a list of dicts, found dict"),
        ([ASK], [print], r"tools\[0\]: expected a dict, found builtin_function_or_method"),
        ([{"role": "user", "content": [np.zeros(1)]}], None, r"messages\[0\]\['content'\]\[0\]: expected a JSON value"),
    ],
)
def test_arguments_are_checked(messages: Any, tools: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatTemplate(GLM4).render(messages, tools)


def test_variables_are_checked() -> None:
    with pytest.raises(UserError, match="open: expected a JSON value, found builtin_function_or_method"):
        ChatTemplate("").render([], open=open)


def test_messages_that_hold_themselves() -> None:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = [message]
    with pytest.raises(UserError, match="nest without end"):
        ChatTemplate(GLM4).render([message])


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ ''['__class__']['__mro__'] }}", "unsafe"),
        ("{{ (''|attr('__class__')).__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{{ messages.append({}) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{{ messages[0].pop('role') }}", "unsafe"),
        ("{{ raise_exception.__globals__['os'] }}", "unsafe"),
        ("{{ namespace.__init__.__globals__['os'] }}", "unsafe"),
        ("{{ dict.__call__.__globals__['os'] }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "names can't begin with an underscore"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "names can't begin with an underscore"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_sandbox(source: str, message: str) -> None:
    messages = [copy.deepcopy(ASK)]
    with pytest.raises(UserError, match=message):
        ChatTemplate(source).render(messages)
    assert messages == [ASK]


def test_the_template_s_own_message_gets_through() -> None:
    with pytest.raises(UserError, match=r"chat template, line \d+: 不认识的 role: 旁白"):
        ChatTemplate(GLM4).render([{"role": "旁白", "content": ""}])
    with pytest.raises(UserError, match=r"^chat template, line 3: 42$"):
        ChatTemplate("\n\n{{ raise_exception(42) }}\n\n").render([])


@pytest.mark.parametrize(
    "source, message",
    [
        ("a\n{{ messages[0].content + 1 }}", "chat template, line 2: TypeError: "),
        ("{{ 1 // (messages | length - 1) }}", "chat template, line 1: ZeroDivisionError: "),
        ("{{ nothing.at.all }}", "chat template, line 1: 'nothing' is undefined"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nest without end"),
        ("{% include 'other' %}", "no loader for this environment"),
        ("{{ messages | tojson(indent={}) }}", "chat template, line 1: TypeError"),
    ],
)
def test_failures_while_rendering(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatTemplate(source).render([ASK])


@pytest.mark.parametrize(
    "source, message",
    [
        ("a\n{% if %}", "chat template, line 2: Expected an expression"),
        ("{{ a | nofilter }}", "chat template, line 1: No filter named 'nofilter'"),
        ("{% for m in messages %}", "chat template, line 1: Unexpected end of template"),
        ("{% generation %}", "chat template, line 1: Unexpected end of template"),
        ("{% for a in b %}" * 40 + "{% endfor %}" * 40, "chat template: nested too deeply"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "chat template: nested too deeply"),
    ],
)
def test_syntax_errors(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatTemplate(source)


def template_in(folder: Path) -> ChatTemplate:
    return ChatTemplate.from_files(folder, read_text_files(folder))


def write(path: Path, **config: Any) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_from_folder(tmp_path: Path) -> None:
    write(
        tmp_path,
        chat_template="config {{ eos_token }} {{ pad_token }}",
        eos_token="<eos>",
        pad_token={"content": "<p>"},
    )
    assert template_in(tmp_path).render([]) == "config <eos> <p>"
    (tmp_path / "chat_template.jinja").write_text("文件 {{ eos_token }}", encoding="utf-8")
    assert template_in(tmp_path).render([]) == "文件 <eos>"
    (tmp_path / "tokenizer_config.json").unlink()
    assert template_in(tmp_path).render([]) == "文件 "


def test_from_folder_errors(tmp_path: Path) -> None:
    for config in (None, {}, {"chat_template": None}):
        if config is not None:
            write(tmp_path, **config)
        with pytest.raises(
            UserError, match=r'no chat_template\.jinja, and no "chat_template" in a tokenizer_config\.json'
        ):
            template_in(tmp_path)
    write(tmp_path, chat_template=[{"name": "default", "template": ""}])
    with pytest.raises(UserError, match=r'tokenizer_config\.json: "chat_template": expected a string, found list'):
        template_in(tmp_path)
    for content, message in (("{", "not valid JSON"), ("[]", "expected a JSON object, found list")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: {message}"):
            template_in(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"chat_template\.jinja: can't be read"):
        template_in(tmp_path)


NAMES = st.text(st.characters(categories=["Lu", "Ll", "Lo", "Nd"], include_characters="_.-"), min_size=1)
TEXT = st.one_of(st.text(), st.sampled_from(["<|assistant|>", "<|observation|>", "}\n{", "f\n{}", "你好\n"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.builds(ToolCall, NAMES, st.dictionaries(TEXT, VALUES, max_size=3)), min_size=1, max_size=4)


@settings(deadline=None)
@given(
    CALLS, st.sampled_from(["", "<|observation|>", "\n<|observation|>\n"]), st.booleans(), st.sampled_from([None, 4])
)
def test_tool_calls_round_trip(calls: list[ToolCall], end: str, ascii_only: bool, indent: int | None) -> None:
    written = [f"{c.name}\n{json.dumps(c.arguments, ensure_ascii=ascii_only, indent=indent)}" for c in calls]
    assert parse_tool_calls("<|assistant|>".join(written) + end) == calls
    assert parse_tool_calls("\n<|assistant|>\n".join(written) + end) == calls


@settings(deadline=None)
@given(CALLS, st.text(st.characters(exclude_categories=["Zs", "Cc", "Zl", "Zp"]), min_size=1))
def test_words_around_the_calls_make_it_an_answer(calls: list[ToolCall], words: str) -> None:
    written = "<|assistant|>".join(f"{c.name}\n{json.dumps(c.arguments)}" for c in calls)
    assert parse_tool_calls(written + words) == []
    assert parse_tool_calls(written + "<|assistant|>" + words) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n今天晴。",
        "get_weather",
        "get_weather\n",
        "get_weather {}",
        '{"city": "北京"}',
        '\n{"city": "北京"}',
        'Here it is:\n{"city": "北京"}',
        "```json\n{}\n```",
        "get_weather\n[]",
        "get_weather\n{'city': 1}",
        'get_weather\n{"city": ',
        'get_weather\n{"x": NaN}',
        "get_weather\n{}<|assistant|>",
        "get_weather\n{}<|observation|><|observation|>",
        "get_weather\n{}<|observation|>\n天气",
        "f\n" + '{"a":' * 100000,
        "f\n{}" + " " * 100000 + "x",
        "f" * 100000,
    ],
)
def test_not_tool_calls(text: str) -> None:
    assert parse_tool_calls(text) == []


@pytest.mark.parametrize(
    "text, opened, expected",
    [
        ("<think>\n嗯\n</think>\n\n晴。\n", False, ("嗯", "晴。")),
        ("\n<think></think>晴。", False, ("", "晴。")),
        ("嗯\n</think>\n晴。", False, ("嗯", "晴。")),  # the prompt ended with <think>
        ("嗯\n</think>\n晴。", True, ("嗯", "晴。")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
        ("<think>还没想完 ", False, ("还没想完", "")),
        ("还没想完 ", True, ("还没想完", "")),
        ("\n晴。 ", False, (None, "\n晴。 ")),
        ("用 <think> 标记", False, (None, "用 <think> 标记")),
        ("", False, (None, "")),
        ("", True, ("", "")),
    ],
)
def test_split_thought(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    assert split_thought(text, opened) == expected


@settings(deadline=None)
@given(st.text(), st.text())
def test_split_thought_round_trip(thought: str, answer: str) -> None:
    assert split_thought(f"<think>\n{thought}\n</think>\n\n{answer}") == (thought.strip(), answer.strip())


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (
            r'{"a\ude00": ["\ud83d x", "\ud83d\ud83d\ude00", "\ud83d\u0041", 1.5]}',
            {"a\ufffd": ["\ufffd x", "\ufffd😀", "\ufffdA", 1.5]},
        ),
        (r'{"a": "\\ud83d"}', {"a": r"\ud83d"}),
        ('{"a": 1e999}', {"a": sys.float_info.max}),
        ('{"a": [-1e400]}', {"a": [-sys.float_info.max]}),
    ],
)
def test_calls_that_could_not_be_written_again(arguments: str, read: Any) -> None:
    """Half a character is in no text that is sent: the answer would end in a fault, a stream without a word."""
    call = ToolCall("f", read)
    assert parse_tool_calls(f"f\n{arguments}") == [call] == [read_call(f"f\n{arguments}")]
    json.dumps(call.arguments, ensure_ascii=False, allow_nan=False).encode()

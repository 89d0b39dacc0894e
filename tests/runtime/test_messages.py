"""Tool turns in OpenAI's form under templates that read GLM's own, and messages that a template leaves out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from glm4export.sources.checkpoint import locate
from glm4runtime.contract import UserError
from glm4runtime.text.chat import ChatTemplate
from glm4runtime.text.tokenizer import Tokenizer

# As GLM-4-0414's own reads messages: the call's name as metadata, results from "observation"; others it passes over.
GLM = """[gMASK]<sop>
{%- if tools %}<|system|>
{{ tools | tojson(ensure_ascii=False) }}{% endif %}
{%- for message in messages %}
    {%- set shown = message['content'].split('</think>')[-1].strip() %}
    {%- if message['role'] in ('system', 'user') %}<|{{ message['role'] }}|>
{{ shown }}
    {%- elif message['role'] == 'assistant' and message.get('metadata', '') %}<|assistant|>{{ message['metadata'] }}
{{ shown }}
    {%- elif message['role'] == 'assistant' %}<|assistant|>
{{ shown }}
    {%- elif message['role'] == 'observation' %}<|observation|>
{{ shown }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
# The same with OpenAI's calls and results; arguments are written as JSON whatever they are.
OPENAI = """{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'observation' }}|>
{{ m.content or '' }}{% for call in m.tool_calls or [] %}<|assistant|>{{ call.function.name }}
{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"""
DEMO = (locate(None).folder / "chat_template.jinja").read_text(encoding="utf-8")

ASK = {"role": "user", "content": "北京和上海的天气。"}


def call(name: str, arguments: Any, identity: str | None = None) -> dict[str, Any]:
    given = {} if identity is None else {"id": identity}
    return {**given, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [call("weather", '{"city": "北京"}', "a"), call("weather", '{"city": "上海"}', "b")]
RESULTS = [
    {"role": "tool", "tool_call_id": "a", "content": "晴"},
    {"role": "tool", "tool_call_id": "b", "content": "雨"},
]
TURN = [ASK, {"role": "assistant", "content": None, "tool_calls": CALLS}, *RESULTS]
OWN = [
    ASK,
    {"role": "assistant", "metadata": "weather", "content": '{"city": "北京"}'},
    {"role": "assistant", "metadata": "weather", "content": '{"city": "上海"}'},
    {"role": "observation", "content": "晴"},
    {"role": "observation", "content": "雨"},
]


def reference(source: str, messages: Any, **variables: Any) -> str:
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, **variables
    )
    return str(rendered[0])


def test_openais_tool_turn_is_rewritten_for_glms_template() -> None:
    messages = copy.deepcopy(TURN)
    expected = (
        "[gMASK]<sop><|user|>\n北京和上海的天气。"
        '<|assistant|>weather\n{"city": "北京"}<|assistant|>weather\n{"city": "上海"}'
        "<|observation|>\n晴<|observation|>\n雨<|assistant|>"
    )
    assert ChatTemplate(GLM).render(messages) == expected == reference(GLM, OWN)
    assert messages == TURN  # the caller's own stay
    assert ChatTemplate(GLM).render(OWN) == expected


def test_words_beside_the_calls_come_first() -> None:
    message = {"role": "assistant", "content": "我查一下。", "tool_calls": [call("f", {"x": [1, "是"]})]}
    text = ChatTemplate(GLM).render([ASK, message], add_generation_prompt=False)
    assert text.endswith('<|assistant|>\n我查一下。<|assistant|>f\n{"x": [1, "是"]}')


@pytest.mark.parametrize("source", [GLM, OPENAI, DEMO], ids=["glm", "openai", "demo"])
def test_results_come_in_the_order_of_their_calls(source: str) -> None:
    template = ChatTemplate(source)
    turned = [*TURN[:2], RESULTS[1], RESULTS[0], ASK]
    assert template.render(turned) == template.render([*TURN, ASK])
    unknown = [*TURN[:2], {**RESULTS[1], "tool_call_id": "?"}, RESULTS[0]]
    assert template.render(unknown).index("晴") < template.render(unknown).index("雨")


@pytest.mark.parametrize("source", [OPENAI, DEMO], ids=["openai", "demo"])
def test_a_template_that_reads_calls_gets_them_as_transformers_gives_them(source: str) -> None:
    objects = [call(c["function"]["name"], json.loads(c["function"]["arguments"]), c["id"]) for c in CALLS]
    messages = [ASK, {"role": "assistant", "content": "", "tool_calls": objects}, *RESULTS]
    text = ChatTemplate(source).render(messages)
    assert text == reference(source, messages)
    # a JSON string, as OpenAI's clients give it, is no string to be quoted again
    assert ChatTemplate(source).render([ASK, {**messages[1], "tool_calls": CALLS}, *RESULTS]) == text
    assert "<|assistant|>" in text and '{"city": "北京"}' in text


@pytest.mark.parametrize(
    "messages, message",
    [
        ([{"role": "function", "content": "21"}], r"messages\[0\] \(role 'function'\): .* leaves \['content'\] out"),
        ([ASK, {"role": "critic", "content": "be kind"}], r"messages\[1\] \(role 'critic'\)"),
        ([{**ASK, "contents": "more"}], r"messages\[0\] \(role 'user'\): the chat template leaves \['contents'\] out"),
        ([{**ASK, "function_call": {"name": "f"}}], r"leaves \['function_call'\] out"),
        ([{**ASK, "prefix": True}], r"leaves \['prefix'\] out"),
        ([ASK, ASK, {"role": "function", "content": ASK["content"]}], r"messages\[2\] \(role 'function'\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", [GLM, DEMO], ids=["glm", "demo"])
def test_what_the_model_would_not_see_is_refused(source: str, messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message + ".*so the model would never see it; write it in a form"):
        ChatTemplate(source).render(messages)


def test_other_things_that_would_not_be_seen() -> None:
    with pytest.raises(UserError, match=r"messages\[1\] \(role 'assistant'\): .* leaves \['metadata'\] out"):
        ChatTemplate(DEMO).render(OWN)
    user_only = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match=r"messages\[1\] \(role 'assistant'\): .* leaves \['tool_calls'\]\[0\] out"):
        ChatTemplate(user_only).render(TURN)
    first_only = (
        "{% for m in messages %}{{ m.content or '' }}{{ m.tool_calls[0].function if m.tool_calls }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"leaves \['tool_calls'\]\[1\] out"):
        ChatTemplate(first_only).render(TURN)
    image = {"role": "user", "content": [{"type": "text", "text": "what is it?"}, {"type": "image_url", "url": "x"}]}
    with pytest.raises(UserError, match=r"leaves \['content'\]\[1\] out"):
        ChatTemplate(DEMO).render([image])
    with pytest.raises(UserError, match="tools: the chat template leaves them out"):
        ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render([ASK], [{"name": "f"}])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \n"}, {"role": "assistant", "content": "a", "tool_calls": None}],
        [
            {**ASK, "name": "Li", "id": 3},
            {"role": "assistant", "content": "晴", "reasoning_content": "嗯", "audio": None},
        ],
        [ASK, {"role": "assistant", "content": "<think>嗯</think>晴"}, {"role": "user", "content": "  ok  "}],
        [ASK, {"role": "assistant", "content": "<think>only a thought</think>"}, ASK],
        [ASK, ASK, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "yes"}],
        OWN,
    ],
)
def test_what_may_be_dropped_is_not_refused(messages: Any) -> None:
    assert ChatTemplate(GLM).render(messages) == reference(GLM, messages)


def test_parts_of_text_for_a_template_of_strings() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    message = {"role": "user", "content": parts}
    assert ChatTemplate(GLM).render([message]) == reference(GLM, [{"role": "user", "content": "你好"}])
    assert ChatTemplate(DEMO).render([message]) == reference(DEMO, [message])


def test_a_template_that_reads_its_messages_closely() -> None:
    """The markers that look for what is left out fail here; each part is looked at on its own."""
    source = (
        "{% for m in messages %}{% if m.content not in ('yes', 'no') %}{{ raise_exception('what?') }}{% endif %}"
        "{% if m.role == 'user' %}{{ 1 if m.content == 'yes' else 0 }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source)
    answers = [{"role": "user", "content": "yes"}, {"role": "user", "content": "no"}]
    assert template.render(answers) == "10"


@pytest.mark.parametrize(
    "calls, message",
    [
        ({"a": 1}, r'messages\[1\]\["tool_calls"\]: expected a list, found dict'),
        (["f"], r"tool_calls\"\]\[0\]: expected {\"function\": .*found 'f'"),
        ([{"function": {"arguments": "{}"}}], r"tool_calls\"\]\[0\]: expected {\"function\""),
        ([call("f", '{"a": ')], r"tool_calls\"\]\[0\]: arguments: expected a JSON object, found '{\"a\": '"),
        ([call("f", "[1]")], r"arguments: expected a JSON object, found '\[1\]'"),
        ([call("f", 3)], r"arguments: expected a JSON object or its text, found 3"),
    ],
)
@pytest.mark.parametrize("source", [GLM, OPENAI], ids=["glm", "openai"])
def test_calls_that_are_none(source: str, calls: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatTemplate(source).render([ASK, {"role": "assistant", "content": "", "tool_calls": calls}])


def test_the_embedded_template_is_that_of_the_checkpoint() -> None:
    assert Path(locate(None).folder / "chat_template.jinja").read_text(encoding="utf-8") == DEMO


def test_a_developers_message_is_the_systems() -> None:
    said = {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}
    for source in (GLM, DEMO):
        text = ChatTemplate(source).render([said, ASK])
        assert text == reference(source, [{"role": "system", "content": "Be kind."}, ASK])
    source = "{% for m in messages %}{{ m.role if m.role in ['developer', 'user'] }}{{ m.content }}{% endfor %}"
    assert ChatTemplate(source).render([{**said, "content": "Be kind."}]) == "developerBe kind."


@pytest.mark.parametrize("source", [GLM, DEMO, OPENAI], ids=["glm", "demo", "openai"])
@pytest.mark.parametrize("content", ["<think>嗯嗯</think>\n晴。", "嗯嗯\n</think>\n\n晴。", "晴。"])
@pytest.mark.parametrize("parts", [False, True])
def test_old_thoughts_are_not_in_the_prompt(source: str, content: str, parts: bool) -> None:
    given = [{"type": "text", "text": content}] if parts else content
    if parts and source == OPENAI:
        pytest.skip("that template takes strings, and joins them")
    message = {"role": "assistant", "content": given, "reasoning_content": "嗯嗯"}
    text = ChatTemplate(source).render([ASK, message, ASK])
    assert "嗯嗯" not in text and "think>" not in text and text.count("晴。") == 1
    assert text == reference(source, [ASK, {"role": "assistant", "content": "晴。"}, ASK])


def test_openais_shapes_of_a_tool_turn() -> None:
    """Content null, absent, empty and in parts; ids and types; a result in parts."""
    calls = [call("f", "{}", "call_1")]
    result = {"role": "tool", "tool_call_id": "call_1", "name": "f", "content": [{"type": "text", "text": "晴"}]}
    said = {"role": "assistant", "tool_calls": calls, "refusal": None, "audio": None, "function_call": None}
    for source in (GLM, DEMO):
        texts = {
            ChatTemplate(source).render([ASK, {**said, **content}, result, ASK])
            for content in ({}, {"content": None}, {"content": ""}, {"content": []})
        }
        assert len(texts) == 1
        assert texts.pop().split("<|observation|>\n")[1].startswith("晴<|user|>")


# As GLM-Z1-Rumination's: a system turn with the tools written out, the caller's own left out, calls as content.
TOOLS = [
    {"name": "search", "description": "Search.", "parameters": {"type": "object", "properties": {"query": {}}}},
    {"name": "click", "description": "Follow a link.", "parameters": {"type": "object", "properties": {"link_id": {}}}},
    {"name": "open", "description": "Open a page.", "parameters": {"type": "object", "properties": {"url": {}}}},
    {"name": "finish", "description": "Finish.", "parameters": {"type": "object", "properties": {}}},
]
RUMINATION = (
    "[gMASK]<sop><|system|>\n你是一个深度研究助手。\n\n"
    + json.dumps(TOOLS)
    + """
{%- for message in messages if message.role != 'system' %}{%- set role = message['role'] %}
{%- set visible = message['content'].split('</think>')[-1].strip() %}{%- set meta = message.get("metadata", "") %}
{%- if role == 'user' %}<|user|>
{{ visible }}{%- elif role == 'assistant' and not meta %}<|assistant|>
{{ visible }}{%- elif role == 'assistant' and meta %}<|assistant|>{{ meta }}
{{ visible }}{%- elif role == 'observation' %}<|observation|>
{{ visible }}{%- endif %}{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
)


def test_ruminations_own_tools() -> None:
    template = ChatTemplate(RUMINATION)
    assert template.own_tools == TOOLS
    said = {"role": "assistant", "content": None, "tool_calls": [call("search", '{"query": "天气"}', "a")]}
    text = template.render([ASK, said, {"role": "tool", "tool_call_id": "a", "content": "【0†t†u】"}])
    turn = '{"name": "search", "arguments": {"query": "天气"}}'
    thought = {"role": "assistant", "content": f"<think>嗯</think>{turn}"}  # as the model's card keeps it
    assert text == reference(RUMINATION, [ASK, thought, {"role": "observation", "content": "【0†t†u】"}])
    assert text.endswith(f"<|assistant|>\n{turn}<|observation|>\n【0†t†u】<|assistant|>")
    with pytest.raises(UserError, match=r"tools: .*tools of its own \(search, click, open, finish\), and needs none"):
        template.render([ASK], [{"name": "search"}])
    with pytest.raises(UserError, match=r"messages\[0\] \(role 'system'\)"):
        template.render([{"role": "system", "content": "Be brief."}, ASK])
    assert [ChatTemplate(source).own_tools for source in (GLM, DEMO, OPENAI, "{{ messages[0].parameters }}")] == [
        []
    ] * 4


@pytest.mark.parametrize("source", [GLM, DEMO, RUMINATION], ids=["glm", "demo", "rumination"])
def test_the_prefix_stands_once(source: str) -> None:
    tokenizer = Tokenizer.from_file(locate(None).folder / "tokenizer.json")
    prefix = [tokenizer.token_id(token) for token in ("[gMASK]", "<sop>")]
    text = ChatTemplate(source).render([ASK, {"role": "assistant", "content": "晴。"}, ASK])
    ids = tokenizer.encode(text)
    assert ids[:2] == prefix and ids.count(prefix[0]) == ids.count(prefix[1]) == 1  # type: ignore[arg-type]
    assert tokenizer.encode("[gMASK]<sop>hello") == [*prefix, *tokenizer.encode("hello")]  # a raw prompt, the same
    assert tokenizer.encode("hello")[0] not in prefix

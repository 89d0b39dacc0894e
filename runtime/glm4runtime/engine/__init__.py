"""Many sequences at once on one bundle: what services embed.

>>> from glm4runtime import Engine, Request
>>> with Engine.load("glm-4-9b", slots=8, max_seq_len=4096) as engine:
...     for delta in engine.generate(Request(messages=[{"role": "user", "content": "Hello"}])):
...         print(delta.content, end="", flush=True)
"""

"""Chat templates with tools in the manner of three families, and one conversation that ends in a call."""

from __future__ import annotations

QWEN = """\
{%- if tools %}{{- "<|im_start|>system\\n# Tools\\n<tools>" }}
{%- for tool in tools %}{{- "\\n" + (tool | tojson) }}{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}{%- endif %}
{%- for message in messages %}
  {{- "<|im_start|>" + message.role + "\\n" + (message.content or "") }}
  {%- for call in message.tool_calls or [] %}
    {{- "<tool_call>\\n" + ({"name": call.function.name, "arguments": call.function.arguments} | tojson) }}
    {{- "\\n</tool_call>" }}
  {%- endfor %}
  {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- if tools %}{{- "<|start_header_id|>system<|end_header_id|>\\n\\nFunctions:\\n" }}
{%- for tool in tools %}{{- (tool | tojson(indent=4)) + "\\n\\n" }}{%- endfor %}{{- "<|eot_id|>" }}{%- endif %}
{%- for message in messages %}
  {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
  {%- if message.tool_calls %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|python_tag|>{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + "}<|eom_id|>" }}
  {%- else %}
    {{- message.content + "<|eot_id|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}
"""
COHERE = """\
{{- bos_token }}
{%- for tool in tools or [] %}
  {{- "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>" + (tool | tojson) + "<|END_OF_TURN_TOKEN|>" }}
{%- endfor %}
{%- for message in messages %}
  {{- "<|START_OF_TURN_TOKEN|>" + ("<|CHATBOT_TOKEN|>" if message.role == "assistant" else "<|USER_TOKEN|>") }}
  {%- if message.tool_calls %}
    {{- "<|START_ACTION|>[" }}
    {%- for call in message.tool_calls %}
      {{- '{"tool_call_id": "' + loop.index0 | string + '", "tool_name": "' + call.function.name + '", ' }}
      {{- '"parameters": ' + (call.function.arguments | tojson) + "}" + ("" if loop.last else ", ") }}
    {%- endfor %}
    {{- "]<|END_ACTION|>" }}
  {%- else %}
    {{- message.content }}
  {%- endif %}
  {{- "<|END_OF_TURN_TOKEN|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>" }}{%- endif %}
"""
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "cohere": COHERE}

RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}
"""How transformers reads an answer of the first template; the patterns look like paths, which they are not."""

ARGUMENTS = {"city": "Zürich", "days": 2, "units": {"wind": "m/s", "metric": True}}
TOOL = {
    "type": "function",
    "function": {
        "name": "forecast",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED = [{"role": "user", "content": "Weather?"}]
CALLED = [{"type": "function", "function": {"name": "forecast", "arguments": ARGUMENTS}}]
CONVERSATION = [*ASKED, {"role": "assistant", "content": "", "tool_calls": CALLED}]

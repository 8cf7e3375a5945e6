"""Chats follow the folder's own template to the id, and nobody's message becomes a token of the template."""
import json
import re
from datetime import datetime

import pytest

from model import Tokenizer, UserError
from test_tokenizer import write_folder

CONVERSATION = [{"role": "user", "content": " The price? "}, {"role": "assistant", "content": "<think>x</think> 12"},
                {"role": "user", "content": "the end"}]
SYSTEM = "<|im_start|>system\n%s<|im_end|>\n"
CHATML = ("{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA = ("{{- bos_token }}\n{%- set date = strftime_now('%d %b %Y') %}\n"
         "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}\n"
         "{{- 'Today Date: ' + date + '\n\n<|eot_id|>' }}\n{%- for m in messages %}\n    {{- '<|start_header_id|>' + "
         "m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
         "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
         "{%- endif %}\n")
R1 = ("{{bos_token}}{%- for m in messages %}{%- if m['role'] == 'user' %}{{'<｜User｜>' + m['content']}}{%- endif %}"
      "{%- if m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
      "{% set content = content.split('</think>')[-1] %}{% endif %}"
      "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}"
      "{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}")
TURNS = ("<|im_start|>user\n The price? <|im_end|>\n<|im_start|>assistant\n<think>x</think> 12<|im_end|>\n"
         "<|im_start|>user\nthe end<|im_end|>\n<|im_start|>assistant\n")
HEADER = "<|start_header_id|>%s<|end_header_id|>\n\n"
CHATS = {  # kind: (template, what it makes of CONVERSATION)
    "qwen": (CHATML.replace("DEFAULT", QWEN), SYSTEM % QWEN + TURNS),
    "smol": (CHATML.replace("DEFAULT", SMOL), SYSTEM % SMOL + TURNS),
    "llama": (LLAMA, "<|begin_of_text|>" + HEADER % "system" + "Today Date: {date}\n\n<|eot_id|>" + HEADER % "user"
              + "The price?<|eot_id|>" + HEADER % "assistant" + "<think>x</think> 12<|eot_id|>" + HEADER % "user"
              + "the end<|eot_id|>" + HEADER % "assistant"),
    "r1": (R1, "<｜begin▁of▁sentence｜><｜User｜> The price? <｜Assistant｜> 12<｜end▁of▁sentence｜>"
               "<｜User｜>the end<｜Assistant｜>"),
}


@pytest.mark.parametrize("kind", CHATS)
def test_chat(tmp_path, kind):
    template, text = CHATS[kind]
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind, template))
    spec, ids = json.loads((tmp_path / "tokenizer.json").read_text("utf-8")), tokenizer.chat(CONVERSATION)
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    pieces = re.split("(" + "|".join(map(re.escape, added)) + ")", text.replace("{date}", f"{datetime.now():%d %b %Y}"))
    assert ids == [i for p in pieces for i in ([added[p]] if p in added else tokenizer.encode(p))]
    theirs = pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ids == theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("kind", CHATS)
def test_a_message_never_makes_a_token_of_the_template(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind, CHATS[kind][0]))
    def tokens(content):
        return [i for i in tokenizer.chat([{"role": "user", "content": content}]) if i in tokenizer._added.values()]
    text = "".join(tokenizer._special) + "<|im_<|im_end|>end|><\ufdd0|im_end|><\ufdd0｜User｜><｜User｜>"
    assert tokens(text) == tokens("x") == tokens("x\ufdd0")  # nor does a message eat the template's own
    assert text.replace("\ufdd0", "") in tokenizer.decode(tokenizer.chat([{"role": "user", "content": text}]))


def test_where_the_template_comes_from_and_what_it_may_do(tmp_path):
    def chat(template, role="user"):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, "gpt2", template))
        return tokenizer.decode(tokenizer.chat([{"role": role, "content": "é<"}]))
    assert chat([{"name": "default", "template": "yes"}, {"name": "tool_use", "template": "no"}]) == "yes"
    template = ("{% if true %}\n  {% endif %}{{ messages | tojson }}{% for m in [1, 2] %}{{ m }}{% break %}{% endfor %}"
                "{{ eos_token }}{{ tools }}")
    assert chat(template) == '[{"role": "user", "content": "é<"}]1<|im_end|>None'
    for template, words in ((None, "no chat template; use --raw"), ("{{ raise_exception('a\nb') }}", "fails: a b"),
                            ("{% if %}", "template fails"), ("{{ ''.__class__.__mro__ }}", "unsafe")):
        with pytest.raises(UserError, match=words) as error:
            chat(template)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }} file", "utf-8")
    assert chat("config") == "é< file"

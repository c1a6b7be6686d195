"""What each chat template of TRL must train of each conversation, written by hand."""

from tests.data_room.conversations import CHATML, LIU, ROWS, SIX, both

ALTERNATE, NO_SYSTEM = "must alternate", "System role not supported"
NO_TOOLS, NO_CALL, TWO_ROLES = "tools are left out", "leaves out the call of tool `multiply`", "Only user and assistant"
JSON_CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 2, "b": null}}\n</tool_call>'
# Where the row has null, some templates write Python's None: their own form, not ours to change.
XML_CALL_NONE = (
    "<tool_call>\n<function=multiply>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\nNone\n</parameter>\n"
    "</function>\n</tool_call>"
)
XML_CALL = XML_CALL_NONE.replace("None", "null")
LFM_CALL = "<|tool_call_start|>[multiply(a=2, b=None)]<|tool_call_end|>"
GEMMA_CALL_NONE = "<|tool_call>call:multiply{a:2,b:None}<tool_call|>"
GEMMA_CALL = "<|tool_call>call:multiply{a:2,b:null}<tool_call|>"
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>multiply\n"
    '```json\n{"a": 2, "b": null}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
GLM_CALL = (
    "<tool_call>multiply\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n"
    "<arg_key>b</arg_key>\n<arg_value>null</arg_value>\n</tool_call>"
)
GPT_CALL = ' to=functions.multiply<|channel|>commentary json<|message|>{"a": 2, "b": null}'
LLAMA_CALL = '{"name": "multiply", "parameters": {"a": 2, "b": null}}'
MUSE_CALL = (
    ' to=multiply<|message|><atem:function_calls>\n<atem:invoke name="multiply">\n<atem:parameter name="a">2'
    '</atem:parameter>\n<atem:parameter name="b">null</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
)
EOT = both("…<|eot_id|>")
COHERE, COHERE2 = both("…<|END_OF_TURN_TOKEN|>"), both("…<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")
DEEPSEEK, GEMMA, TURN = both("…<｜end▁of▁sentence｜>"), both("…<end_of_turn>"), both("…<turn|>")
GLM, PHI, LLAVA = both("\n<think></think>\n…<|user|>"), both("…<|end|>"), both(" …</s>")
UTTERANCE, MUSE = both(" …<end_of_utterance>"), both(" to=user<|message|>…<|eot|>")
GPT = [
    f"<|channel|>final<|message|>{SIX}<|end|>",
    f"<|channel|>final<|message|>{LIU}<|return|>",
]  # earlier turns: <|end|>
QWEN3 = both("<think>\n\n</think>\n\n…<|im_end|>")
# The generation prompt opens the thinking; the model closes it.
OPENED = both("\n</think>\n\n…<|im_end|>")
OPENED_THOUGHTS = [f"Twice three.\n</think>\n\n{SIX}<|im_end|>", f"Translate six.\n</think>\n\n{LIU}<|im_end|>"]
QWEN_THOUGHTS = ["<think>\n" + said for said in OPENED_THOUGHTS]
NEMOTRON = both(
    "<think></think>…<|im_end|>"
)  # the prompt's "<think>\n" is not how these begin an answer without thinking
NEMOTRON_CALL = f"<think></think>\n{XML_CALL_NONE}\n<|im_end|>"

Expected = list[str] | str  # the trained text of each answer, or a part of the reason for which the row is refused
# Names of templates → expected for plain, tools and thinking. Where a template shows no thinking, only the words are left.
TABLE: dict[str, tuple[Expected, Expected, Expected]] = {
    "cohere cohere_training": (COHERE, ALTERNATE, COHERE),
    "cohere2 cohere2_training": (COHERE2, ALTERNATE, COHERE2),
    "deepseek_r1_distill deepseek_r1_distill_training": (DEEPSEEK, NO_TOOLS, DEEPSEEK),
    "deepseekv3 deepseekv3_training": (
        DEEPSEEK,
        [f"{DEEPSEEK_CALL}<｜end▁of▁sentence｜>", *DEEPSEEK],
        DEEPSEEK,
    ),
    "gemma gemma_training": (NO_SYSTEM, ALTERNATE, GEMMA),
    "gemma3 gemma3_training": (GEMMA, ALTERNATE, GEMMA),
    "gemma4 gemma4_v3 gemma4_v4": (TURN, [f"{GEMMA_CALL_NONE}<|tool_response>", *TURN], TURN),
    "gemma4_v2": (TURN, [f"{GEMMA_CALL_NONE}<turn|>", *TURN], TURN),
    "gemma4_v5 diffusion_gemma diffusion_gemma_training": (
        TURN,
        [f"{GEMMA_CALL}<|tool_response>", *TURN],
        [f"{SIX}<turn|>", f"<|channel>thought\nTranslate six.\n<channel|>{LIU}<turn|>"],
    ),
    "glm4moe glm4moe_training": (
        GLM,
        [f"\n<think></think>\n{GLM_CALL}<|observation|>", *GLM],
        [f"\n<think></think>\n{SIX}<|user|>", f"\n<think>Translate six.</think>\n{LIU}<|user|>"],
    ),
    "gptoss gptoss_training": (
        GPT,
        [f"{GPT_CALL}<|call|>", *GPT],
        [GPT[0], f"<|channel|>analysis<|message|>Translate six.<|end|><|start|>assistant{GPT[1]}"],
    ),
    "idefics3 idefics3_training smolvlm smolvlm_training": (UTTERANCE, NO_TOOLS, UTTERANCE),
    "lfm2 lfm2_training": (CHATML, NO_CALL, CHATML),
    "lfm2_v2 lfm2_v2_training": (CHATML, [f"{LFM_CALL}<|im_end|>", *CHATML], CHATML),
    "lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl": (
        CHATML,
        [f"{LFM_CALL}<|im_end|>", *CHATML],
        [CHATML[0], f"<think>Translate six.</think>{LIU}<|im_end|>"],
    ),
    "llama3 llama3_training": (EOT, NO_TOOLS, EOT),
    "llama3_1 llama3_2": (EOT, [f"{LLAMA_CALL}<|eot_id|>", *EOT], EOT),
    "llava_next llava_next_training": (LLAVA, TWO_ROLES, LLAVA),
    "muse_glimmer muse_glimmer_training": (
        MUSE,
        [f"{MUSE_CALL}<|eot|>", *MUSE],
        [
            f" to=self<|message|>Twice three.<|eom|><|start|>assistant{MUSE[0]}",
            f" to=self<|message|>Translate six.<|eom|><|start|>assistant{MUSE[1]}",
        ],
    ),
    "nemotron_3_nano nemotron_3_nano_training nemotron_3_super nemotron_3_super_training": (
        NEMOTRON,
        [NEMOTRON_CALL, *NEMOTRON],
        [f"<think></think>\n{SIX}<|im_end|>", f"Translate six.\n</think>\n{LIU}<|im_end|>"],
    ),
    "nemotron_3_5_lightning nemotron_3_5_lightning_training nemotron_3_ultra nemotron_3_ultra_training": (
        NEMOTRON,
        [NEMOTRON_CALL, *NEMOTRON],
        [NEMOTRON[0], f"Translate six.</think>{LIU}<|im_end|>"],
    ),
    "phi3 phi3_training phi3_5 phi3_5_training": (PHI, NO_TOOLS, PHI),
    "qwen2_5 qwen2_5_training qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_vl qwen3_vl_training": (
        CHATML,
        [f"{JSON_CALL}<|im_end|>", *CHATML],
        CHATML,
    ),
    "qwen2_5_vl qwen2_5_vl_training": (CHATML, NO_TOOLS, CHATML),
    "qwen3 qwen3_training": (QWEN3, [f"<think>\n\n</think>\n\n{JSON_CALL}<|im_end|>", *QWEN3], QWEN_THOUGHTS),
    "qwen3_5_nothink qwen3_5_nothink_training": (CHATML, [f"{XML_CALL_NONE}<|im_end|>", *CHATML], QWEN_THOUGHTS),
    "qwen3_5_think qwen3_5_think_training": (
        OPENED,
        [f"\n</think>\n\n{XML_CALL_NONE}<|im_end|>", *OPENED],
        OPENED_THOUGHTS,
    ),
    "qwen3_6 qwen3_6_training qwen3_8 qwen3_8_training": (
        OPENED,
        [f"\n</think>\n\n{XML_CALL}<|im_end|>", *OPENED],
        OPENED_THOUGHTS,
    ),
}
EXPECTED = {
    (name, fixture): expected
    for names, row in TABLE.items()
    for name in names.split()
    for fixture, expected in zip(ROWS, row, strict=True)
}

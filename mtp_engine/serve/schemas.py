"""What requests may hold: OpenAI's parameters, vLLM's beside them, and our own (`speculate`, `tree`, `draft_metrics`,
`return_drafts`). Fields that are not named here are ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=4_000_000)]


class StreamOptions(BaseModel):
    """include_usage: a last chunk without choices counts the tokens. continuous_usage_stats: every chunk does."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class StructuredOutputs(BaseModel):
    """vLLM's: exactly one of them."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(BaseModel):
    """What all endpoints share. None is always the default."""

    model_config = ConfigDict(protected_namespaces=())

    model: str | None = Field(None, description="The served model; left out, it is that one.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; the default is 1.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1 is off.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, description="The same seed gives the same text, however it is drafted.")
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=128)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="The lowest number runs first.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    speculate: bool | None = Field(None, description="Ours: false decodes without drafts, to the same text.")
    tree: str | None = Field(None, description="Ours: a smaller tree than the server's, such as chain:2.")
    draft_metrics: bool | None = Field(None, description="Ours: `metrics.speculative_decoding`, with vLLM's names.")
    return_drafts: bool | None = Field(
        None, description="Ours: the text of each token and the depth it was drafted at."
    )


class FunctionCall(BaseModel):
    name: str
    arguments: str = "{}"


class ToolCallGiven(BaseModel):
    id: str | None = None
    type: str | None = "function"
    function: FunctionCall


class ContentPart(BaseModel):
    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    tool_calls: list[ToolCallGiven] | None = None
    tool_call_id: str | None = None


class Function(BaseModel):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="For the chat template: enable_thinking, ...")
    functions: Any = Field(None, description="Refused: use tools.")
    function_call: Any = Field(None, description="Refused: use tool_choice.")
    modalities: list[str] | None = None
    audio: Any = None


class CompletionRequest(Sampling):
    prompt: Text | list[int] | list[Text] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0, description="16 by default; 0 with echo only scores the prompt.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = Field(None, description="Refused: the model does not fill in.")
    best_of: int | None = Field(None, ge=1, description="Refused where it is not n.")


class TokenizeRequest(BaseModel):
    model: str | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(BaseModel):
    model: str | None = None
    tokens: list[int]


class TextFormat(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class TextOptions(BaseModel):
    format: TextFormat | None = None
    verbosity: str | None = None


class FlatTool(BaseModel):
    """A function as the responses API writes it, without an object of its own."""

    type: str = "function"
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamedTool(BaseModel):
    type: Literal["function"] = "function"
    name: str


class ResponsesRequest(Sampling):
    input: Text | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = Field(None, description="Refused: nothing is stored.")
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    background: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

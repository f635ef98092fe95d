"""What is asked over HTTP, and what is answered; limits that need no model stand here.

The fields of `/generate` are those of the first LatentForge; the others are OpenAI's, as far as they mean something
here. A field that would change the text and is not supported is an error when it is set to anything but its default:
a server that drops what it does not know answers another question.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


MOST_CHOICES = 16  # texts of one call
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_LOGPROBS = 20
LARGEST = 2**31 - 1


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair is no text") from None
    return text


def _whole(value: Any) -> Any:
    # JSON knows no integers: 5.0 is one
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _only(*allowed: Any) -> Any:
    """A field that may only have its default: for clients that send what they do not use."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"is not supported, leave it out (or {' or '.join(map(str, allowed))})")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": list(allowed)})]


Text = Annotated[str, AfterValidator(_encodable)]
Int = Annotated[int, BeforeValidator(_whole)]
TokenIds = Annotated[list[Annotated[Int, Field(ge=0, le=LARGEST)]], Field(min_length=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=LONGEST_STOP)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[Int, Field(ge=0, le=LARGEST)]
Tokens = Annotated[Int, Field(ge=1, le=LARGEST)]
Seed = Annotated[Int, Field(ge=-(2**63), lt=2**63)]


class Asked(BaseModel):
    """A request's body: nothing unknown in it, and no word where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True)


class GenerateRequest(Asked):
    """Continue a text."""

    prompt: Text
    max_new_tokens: Tokens = 128
    temperature: Temperature = 0.8
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Seed | None = None


class GenerateResponse(BaseModel):
    generated_text: str
    prompt: str
    num_tokens_generated: int
    compression_factor: int


class StreamOptions(Asked):
    include_usage: bool = False


class Common(Asked):
    """What completions and chats share."""

    model: Text | None = None
    temperature: Temperature | None = 1.0
    top_p: TopP | None = 1.0
    top_k: TopK | None = Field(0, description="Not OpenAI's: sample among so many likeliest tokens; 0 for all.")
    n: Annotated[Int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    user: Text | None = None
    ignore_eos: bool = Field(False, description="Not OpenAI's: go on behind the end of a text, for measurements.")
    frequency_penalty: _only(0, 0.0, None) = 0  # type: ignore[valid-type]
    presence_penalty: _only(0, 0.0, None) = 0  # type: ignore[valid-type]
    repetition_penalty: _only(1, 1.0, None) = 1  # type: ignore[valid-type]
    logit_bias: _only({}, None) = None  # type: ignore[valid-type]


class CompletionRequest(Common):
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    max_tokens: Tokens | None = 16
    logprobs: Annotated[Int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: _only(False, None) = False  # type: ignore[valid-type]
    suffix: _only("", None) = None  # type: ignore[valid-type]
    best_of: _only(1, 1.0, None) = None  # type: ignore[valid-type]


class ContentPart(Asked):
    type: Literal["text"]
    text: Text


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1)]
    name: Text | None = None


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[Int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatLogprobs(BaseModel):
    content: list[dict[str, Any]]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latentforge"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Info(BaseModel):
    """What is served."""

    model: str
    patch_size: int
    latent_size: int
    compression_factor: int = Field(description="Tokens per step of the backbone, K.")
    num_parameters: int
    head: str
    decoder: str
    device: str
    dtype: str
    max_tokens: int
    has_likelihood: bool = Field(description="Whether logprobs can be asked for.")
    has_chat_template: bool
    version: str


class Status(BaseModel):
    status: str
    model: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """OpenAI's shape."""

    error: ErrorBody

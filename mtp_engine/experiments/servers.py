"""Other engines behind OpenAI's API (written next)."""


def ask_server(engine, case, prompts):
    raise NotImplementedError

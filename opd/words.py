"""Words of other trainers (TRL, verl, transformers' Trainer) and what stands for them in a pair file.

A key that is unknown here and known there is answered with the key of this trainer, or with what there is instead.
"""

BATCH = "rollout.prompts_per_step x rollout.n responses make an update, and optim.micro_batch_tokens bounds a pass"

ELSEWHERE = {
    "learning_rate": "it is optim.lr",
    "lr_scheduler_type": "it is optim.schedule, constant or cosine",
    "warmup_ratio": "it is optim.warmup_steps, a number of updates",
    "max_grad_norm": "it is optim.grad_clip",
    "adam_beta1": "it is the first of optim.betas",
    "adam_beta2": "it is the second of optim.betas",
    "num_train_epochs": "it is data.epochs",
    "max_steps": "it is optim.steps",
    "per_device_train_batch_size": BATCH,
    "train_batch_size": BATCH,
    "gradient_accumulation_steps": BATCH,
    "generation_batch_size": "it is rollout.batch_size",
    "per_device_eval_batch_size": "it is eval.batch_size",
    "num_generations": "it is rollout.n",
    "max_completion_length": "it is rollout.max_response_tokens",
    "max_new_tokens": "it is rollout.max_response_tokens",
    "max_response_length": "it is rollout.max_response_tokens",
    "max_prompt_length": "it is data.max_prompt_tokens",
    "max_length": "it is data.max_prompt_tokens and rollout.max_response_tokens",
    "use_vllm": "it is rollout.engine=vllm",
    "vllm_mode": "it is rollout.servers, which is empty for a vLLM beside the trainer",
    "vllm_gpu_memory_utilization": "it is rollout.gpu_memory",
    "tensor_parallel_size": "it is rollout.tensor_parallel",
    "beta": "it is loss.jsd_beta, which loss.divergence=jsd reads",
    "lmbda": "every response is the student's own here: there is no mixture with data",
    "loss_type": "it is loss.divergence",
    "bf16": "it is student.dtype and teacher.dtype",
    "fp16": "student.dtype and teacher.dtype take float32 or bfloat16; float16 is not supported",
    "torch_dtype": "it is student.dtype and teacher.dtype",
    "attn_implementation": "it is student.attn_implementation and teacher.attn_implementation",
    "gradient_checkpointing": "it is engine.gradient_checkpointing",
    "fsdp": "a student is split by DeepSpeed: engine.kind=deepspeed and engine.deepspeed=zero3",
    "zero_stage": "it is engine.deepspeed, zero0 to zero3",
    "model_name_or_path": "it is student.path",
    "teacher_model_name_or_path": "it is teacher.path",
    "teacher_model_server_url": "it is teacher.servers, with teacher.mode=server",
    "dataset_name": "it is data.train, which takes files, folders and hub:NAME@REVISION",
    "report_to": 'it is log.to, for example ["tensorboard", "wandb"]',
    "logging_steps": "metrics of every update are written; log.diagnostics_every says how often the others are",
    "save_steps": "it is checkpoint.every",
    "save_total_limit": "it is checkpoint.keep",
    "eval_steps": "it is eval.every",
    "eval_strategy": "it is eval.every, a number of updates",
    "resume_from_checkpoint": "the same command continues a run; --resume DIR names a checkpoint",
    "push_to_hub": "nothing is uploaded; a checkpoint is a Hugging Face folder, which `hf upload` takes",
    "lora": "it is student.lora",
    "use_peft": "adapters are configured in student.lora",
    "lora_rank": "it is student.lora.rank",
    "lora_r": "it is student.lora.rank",
    "lora_alpha": "it is student.lora.alpha",
    "lora_target_modules": "it is student.lora.targets",
    "target_modules": "it is student.lora.targets",
    "lora_dropout": "adapters have no dropout: the update scores and learns from the same states",
    "load_in_4bit": "there are no quantised models; teacher.dtype=bfloat16 and teacher.placement=host save memory",
    "load_in_8bit": "there are no quantised models; teacher.dtype=bfloat16 and teacher.placement=host save memory",
    "optim_8bit": "AdamW's moments are float32; engine.deepspeed=zero2_offload puts them into host memory",
    "reward_funcs": "there are no rewards: the teacher's distribution is the signal",
}


def in_our_words(key: str) -> str | None:
    """What stands here for the last part of a key of another trainer, as the end of a sentence; None: nothing known."""
    return ELSEWHERE.get(key.rpartition(".")[2].lower())

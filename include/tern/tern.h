/* SPDX-License-Identifier: Apache-2.0
 *
 * tern.h: the C interface of Tern, expert-parallel communication for Mixture-of-Experts models.
 *
 * Tern moves the tokens of an MoE layer to the ranks that own their experts (dispatch) and brings the results back,
 * summed (combine). The objects, from the outside in:
 *
 *   tern_group     who the ranks are             tern_group_create_*        collective
 *   tern_exchange  the memory they share         tern_exchange_create       collective
 *   tern_plan      where one batch's tokens go   tern_plan_create           local; filled by tern_plan_route (collective)
 *   tern_dispatch, tern_combine                  operations along a plan    collective
 *
 * A round trip on every rank (error handling left out; examples/c/hello.c is a whole program):
 *
 *   tern_plan_route(plan, &(tern_routing){.struct_size = sizeof(tern_routing), .topk_idx = idx, .num_tokens = T}, NULL, &info);
 *   tern_dispatch(plan, &(tern_dispatch_args){... .tokens = x, .out_tokens = rows ...}, NULL);
 *   ... the local experts work on `rows` ...
 *   tern_combine(plan, &(tern_combine_args){... .rows = rows, .out_tokens = y ...}, NULL);
 *
 * Rules that hold everywhere:
 * - Every function that returns a tern_status writes nothing through its output pointers and changes nothing when it
 *   returns TERN_INVALID_ARGUMENT or TERN_INVALID_STATE. tern_last_error() then says what was asked, what was found and
 *   what to do. Nothing exits, aborts or throws across this interface.
 * - Every struct begins with its own size. Zero the struct, set struct_size = sizeof(struct), set what you need: a zero
 *   field means its documented default (C++ does the first two by itself). Structs only ever grow at their end.
 * - "Collective" means: every rank of the group calls it, and the calls of one lane come in the same order on every rank.
 *   Every wait has a deadline (timeout_ms); a rank that never comes is named in the error.
 * - Sizes named `hidden` count elements of the row's dtype (bytes for TERN_DTYPE_BYTES); names that end in _bytes count
 *   bytes. Matrices are dense and row-major unless a stride is given.
 * - Pointers passed to an operation must stay valid until it completes: on CPU ranks when the call returns (the phase
 *   TERN_PHASE_SEND included); on GPU ranks when the work enqueued on the stream has run. A receive is given the send's arguments again,
 *   and reads what it needs of them.
 * - Ranks may be on several nodes: see docs/protocol.md, "Between nodes". Every node has as many ranks, which follow each other.
 *   A token crosses the network once for each node.
 * - An exchange is used by one thread at a time per lane. Different lanes, and different exchanges, may be used from
 *   different threads at once. A plan belongs to one lane at a time.
 *
 * On GPU ranks, besides:
 * - Pointers in the arguments of an operation are to memory that the rank's GPU reaches: its own, as a rule. The structs themselves
 *   are read before the call returns.
 * - Rows move 16 bytes at a time: tokens and their stride, out_tokens, rows and biases are at multiples of 16 bytes.
 * - A call checks its arguments, enqueues and returns. One waits on the host: tern_plan_route of a plan with extent EXACT, until the
 *   counts are there; other threads run meanwhile.
 * - The operations of a lane must also run in the order of their calls: on one stream, or with events between the streams.
 *   From sm_90 on some follow the kernel in front of them closely (programmatic stream serialization). A kernel of the caller's that does
 *   the same must wait for the one in front of it (griddepcontrol.wait) before it ends, even if it needs nothing from there.
 * - What goes wrong while an operation runs shows later. If a wait ends at its deadline, or ranks called different things, the kernels
 *   end, and what they have written is worth nothing; tern_exchange_get_state then says TERN_HEALTH_FAILED, and every later call returns
 *   the error. Kernels that are enqueued already, and replayed graphs, return at once without writing anything.
 *   What is left out of an operation that otherwise completes (TERN_CAPACITY_EXCEEDED; TERN_INVALID_ARGUMENT for indices that are no
 *   expert, which count as -1) is a notice in tern_exchange_state.failure, while the health stays as it was.
 * - With extent WORST the operations can be captured in a CUDA graph and replayed, with the phases too; a route with extent EXACT
 *   cannot, since the host would wait for it. No operation allocates or loads anything, so none has to run before the capture; a dispatch
 *   must have been called, or captured, before its combine is. Ranks replay the same operations in the same order. The exchange, the plans
 *   and all buffers stay as long as the graph is used; after tern_exchange_recover it must be captured again, since it holds
 *   addresses of windows that are gone.
 * - Ranks may share a GPU as threads of one process. While one of them has begun an operation that another one has not, that
 *   other one must not wait for the whole GPU: cudaDeviceSynchronize, cudaFree and cudaFreeHost do. Streams that share one of the GPU's
 *   queues wait for each other, and there are 8 unless the environment says CUDA_DEVICE_MAX_CONNECTIONS=32 before CUDA starts.
 *   Kernels that wait for each other must fit the GPU together: exchanges and lanes that are used at the same time divide its SMs
 *   between them by num_sms.
 */
#ifndef TERN_TERN_H_
#define TERN_TERN_H_

#include <stddef.h>
#include <stdint.h>

#define TERN_VERSION_MAJOR 0
#define TERN_VERSION_MINOR 1
#define TERN_VERSION_PATCH 0

#if defined(_WIN32)
#define TERN_API
#else
#define TERN_API __attribute__((visibility("default")))
#endif

/* In C++ every field starts at its default, struct_size included; in C, zero the struct and set struct_size. Enums are 4 bytes in both;
 * in C++ their type is fixed, so that a number which is none of them is an error of the call and not of the language. */
#ifdef __cplusplus
#define TERN_SIZE_OF(type) = sizeof(type)
#define TERN_ZERO = {}
#define TERN_ENUM_TYPE : int32_t
extern "C" {
#else
#define TERN_SIZE_OF(type)
#define TERN_ZERO
#define TERN_ENUM_TYPE
#endif

/* ------------------------------------------------------------------------------------------------ status and errors */

typedef enum tern_status TERN_ENUM_TYPE {
  TERN_OK = 0,
  TERN_INVALID_ARGUMENT = 1,   /* a pointer, size, shape or dtype that cannot be; nothing was done */
  TERN_INVALID_STATE = 2,      /* right arguments, wrong moment: a plan not routed, a receive without its send */
  TERN_OUT_OF_MEMORY = 3,      /* the window is too small for what is asked (the text says how much is needed), or the system has none */
  TERN_UNSUPPORTED = 4,        /* valid, but not available on this machine or in this build */
  TERN_TIMEOUT = 5,            /* this rank waited for another one until the deadline */
  TERN_ABORTED = 6,            /* another rank failed and told this one */
  TERN_MISMATCH = 7,           /* ranks called different operations, shapes or versions */
  TERN_STALE_PLAN = 8,         /* the plan was routed before the last recovery; route it again */
  TERN_MASKED_OUT = 9,         /* the other ranks went on without this one */
  TERN_CAPACITY_EXCEEDED = 10, /* worst extent: more rows arrived than the plan has room for; the operation completed without them */
  TERN_SYSTEM_ERROR = 11,      /* the operating system or a driver refused a call */
  TERN_INTERNAL_ERROR = 12     /* a defect in Tern */
} tern_status;

/* The name of a status ("TERN_TIMEOUT"); "TERN_UNKNOWN" for a number that is none. Static storage, any thread. */
TERN_API const char* tern_status_name(tern_status status);

/* The text of the last error of the calling thread, "" if there was none. Valid until this thread's next call that fails. */
TERN_API const char* tern_last_error(void);

/* The library's version, MAJOR * 10000 + MINOR * 100 + PATCH. */
TERN_API int32_t tern_version(void);

/* ----------------------------------------------------------------------------------------------------------- choices */

typedef enum tern_device_type TERN_ENUM_TYPE {
  TERN_DEVICE_AUTO = 0, /* a GPU where there is one and this build has the engine, else the CPU */
  TERN_DEVICE_CPU = 1,
  TERN_DEVICE_CUDA = 2
} tern_device_type;

typedef enum tern_dtype TERN_ENUM_TYPE {
  TERN_DTYPE_BF16 = 0,
  TERN_DTYPE_FP16 = 1,
  TERN_DTYPE_FP32 = 2,
  TERN_DTYPE_FP8_E4M3 = 3,
  TERN_DTYPE_BYTES = 4 /* opaque: one element is one byte */
} tern_dtype;

typedef enum tern_index_type TERN_ENUM_TYPE { TERN_INDEX_INT64 = 0, TERN_INDEX_INT32 = 1 } tern_index_type;

/* How what arrives is laid out. E_l = num_experts / num_ranks local experts. */
typedef enum tern_layout TERN_ENUM_TYPE {
  /* One row per (token, rank), ordered by (source rank, source token). */
  TERN_LAYOUT_RANK_MAJOR = 0,
  /* One row per (token, k) entry of a local expert, grouped by expert, then (source rank, source token, k); each group
   * starts at a multiple of expert_alignment. What a grouped GEMM eats. */
  TERN_LAYOUT_EXPERT_MAJOR = 1,
  /* [E_l, num_ranks * max_tokens, hidden]; rows of one expert in the same order, from the front. What a masked GEMM eats. */
  TERN_LAYOUT_EXPERT_PADDED = 2
} tern_layout;

typedef enum tern_extent TERN_ENUM_TYPE {
  TERN_EXTENT_EXACT = 0, /* the host learns the counts when the plan is routed, and sizes the outputs */
  TERN_EXTENT_WORST = 1  /* the caller gives row_capacity; counts stay on the device */
} tern_extent;

typedef enum tern_phase TERN_ENUM_TYPE {
  TERN_PHASE_WHOLE = 0,
  TERN_PHASE_SEND = 1, /* put the data on their way, and return; nothing of Tern runs after that */
  /* Complete what the plan's last send began; called with the same arguments. Between nodes: a receive of a dispatch and a send of a combine
   * wait for the other ranks of the node to make the same call */
  TERN_PHASE_RECEIVE = 2
} tern_phase;

typedef enum tern_encoding TERN_ENUM_TYPE {
  TERN_ENCODING_AS_GIVEN = 0,
  /* Cast bf16, fp16 or fp32 rows to fp8 e4m3 on the way, one scale for each 128 channels (the last block may be shorter).
   * With amax = max(|x|, 1e-4) over a block, all in FP32: values are x * fl(448 / amax), rounded to nearest even and
   * saturated to 448; the stored scale is fl(amax * fl(1/448)). Scales arrive as float, ceil(hidden/128) per row. */
  TERN_ENCODING_FP8_F32 = 1,
  /* The same with the stored scale rounded up to a power of two, s = 2^ceil(log2(fl(amax * fl(1/448)))), values x / s. */
  TERN_ENCODING_FP8_F32_POW2 = 2,
  /* The same, s stored as its biased exponent, one byte (UE8M0); rows of scales are padded with zero bytes to 4. */
  TERN_ENCODING_FP8_UE8M0 = 3
} tern_encoding;

typedef enum tern_scale_order TERN_ENUM_TYPE {
  TERN_SCALES_ROW_MAJOR = 0,   /* [rows, scales] */
  TERN_SCALES_COLUMN_MAJOR = 1 /* [scales, rows]; expert_padded: [E_l, scales, num_ranks * max_tokens] */
} tern_scale_order;

typedef enum tern_combine_mode TERN_ENUM_TYPE {
  /* Rows of one token on one rank are summed there, rounded once to the wire type, and cross the link as one row. */
  TERN_COMBINE_HIERARCHICAL = 0,
  /* Every expert's row goes to the token's owner, who sums all of them in ascending k. */
  TERN_COMBINE_EXACT = 1
} tern_combine_mode;

/* As what a combine's rows travel: the meaning of wire() in tern_combine. */
typedef enum tern_wire TERN_ENUM_TYPE {
  TERN_WIRE_AS_DTYPE = 0, /* rounded to dtype, to nearest even */
  /* A logarithm of 10 bits for each channel, from FP32: 168 bytes for each 128 channels (the last block may be shorter), 66 % of bf16. The
   * largest magnitude of a block arrives as it is. Others are among 511 that lie between it and the block's smallest that is not zero,
   * at most 16 octaves below, evenly by exponent and mantissa bits read as one integer. Error: R / 1020 of the value where a block spans R
   * octaves, so at most 1.6 % (normally distributed values: 0.4 % root mean square); what is more than 16 octaves below the block's largest,
   * or below 2^-126, may become zero. NaNs and infinities arrive as NaNs. The same bits on every engine and machine; src/base/log_rows.h
   * defines them */
  TERN_WIRE_LOG10BIT = 1,
  /* Sums travel in FP32, as they are: nothing is rounded but the result, at twice the bytes of bf16. Where rows travel as they are given (EXACT;
   * rank_major within one node; FP32 rows) it is the same as AS_DTYPE. Staging must hold such rows: count them in max_row_bytes. GPU
   * ranks: not on the latency path, so not with TERN_ON_TIMEOUT_MASK */
  TERN_WIRE_FP32 = 2
} tern_wire;

typedef enum tern_weighting TERN_ENUM_TYPE {
  TERN_WEIGHTS_NONE = 0,     /* plain sum */
  TERN_WEIGHTS_DISPATCH = 1, /* the topk_weights that the plan's last dispatch carried */
  TERN_WEIGHTS_OWNER = 2     /* topk_weights of the combine's arguments, given by the tokens' owner */
} tern_weighting;

typedef enum tern_timeout_policy TERN_ENUM_TYPE {
  TERN_ON_TIMEOUT_ABORT = 0, /* the operation fails, and so does every later one until tern_exchange_recover */
  /* The operation goes on with a share of zero for the missing rank. CPU ranks: the next one starts a generation without it, in which plans
   * that were routed before are TERN_STALE_PLAN; a route, and a whole dispatch with a routing, are done again in it at once. A send is received
   * before. Between nodes a rank is also given up at once when the connection to it is lost; what would cross its rail is zero, as in
   * tern_exchange_recover; and the wait for a rank takes a quarter of the timeout longer. The wait for a rank that waits for another one
   * itself may take three quarters longer, and again for each further rank that it misses. A rank that was given up and lives gets
   * TERN_MASKED_OUT. GPU ranks: each by itself waits for it no more, replayed graphs too, until tern_exchange_recover, which leaves it out of
   * the next generation; only on the latency path, in dispatches that route and their combines, everything else is TERN_UNSUPPORTED: also,
   * between nodes, combines in mode EXACT. Between nodes the hosts tell each other, so all ranks hear of it */
  TERN_ON_TIMEOUT_MASK = 1
} tern_timeout_policy;

typedef enum tern_mode TERN_ENUM_TYPE {
  TERN_MODE_AUTO = 0, /* by size, and on GPU ranks by SMs too: see docs/design.md */
  TERN_MODE_THROUGHPUT = 1,
  TERN_MODE_LATENCY = 2
} tern_mode;

/* ------------------------------------------------------------------------------------------------------------- group */

typedef struct tern_group tern_group;
typedef struct tern_exchange tern_exchange;
typedef struct tern_plan tern_plan;

typedef enum tern_log_level TERN_ENUM_TYPE {
  TERN_LOG_OFF = 0,
  TERN_LOG_ERROR = 1,
  TERN_LOG_WARNING = 2,
  TERN_LOG_INFO = 3,
  TERN_LOG_DEBUG = 4
} tern_log_level;

/* Called with one line of text without a newline, from whichever thread runs the operation; must not call Tern. */
typedef void (*tern_log_fn)(void* context, tern_log_level level, const char* text);

/* Gathers `bytes` bytes of `send` from every rank into recv[rank * bytes] on every rank. Returns 0, or anything else for a
 * failure. Called from group and exchange creation only, on the calling thread. */
typedef int (*tern_allgather_fn)(void* context, const void* send, void* recv, size_t bytes);

typedef struct tern_group_options {
  size_t struct_size TERN_SIZE_OF(tern_group_options);
  const char* name TERN_ZERO;   /* tells groups of one job apart; default "tern". At most 63 bytes */
  const char* node TERN_ZERO;   /* declares which node this rank is on (ranks with equal names share a node); default: found out */
  int64_t timeout_ms TERN_ZERO; /* deadline of creation; 0: TERN_TIMEOUT_MS, else 30000 */
  tern_log_fn log TERN_ZERO;    /* NULL: lines go to standard error */
  void* log_context TERN_ZERO;
  tern_log_level log_level TERN_ZERO; /* TERN_LOG_OFF (0) means the default: TERN_LOG_LEVEL, else warnings */
  /* Declares nodes where `node` is not given: rank r is on node r / ranks_per_node. 0: TERN_RANKS_PER_NODE, else found out (a host, or a
   * network namespace of it, is a node). Equal on all ranks */
  int32_t ranks_per_node TERN_ZERO;
} tern_group_options;

typedef struct tern_group_info {
  size_t struct_size TERN_SIZE_OF(tern_group_info);
  int32_t rank TERN_ZERO;
  int32_t num_ranks TERN_ZERO;
  int32_t node TERN_ZERO; /* index of this rank's node */
  int32_t num_nodes TERN_ZERO;
  int32_t rank_in_node TERN_ZERO; /* = rail */
  int32_t ranks_in_node TERN_ZERO;
} tern_group_info;

/* From the launcher's environment: torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), Open MPI (OMPI_COMM_WORLD_*),
 * Slurm (SLURM_PROCID, SLURM_NTASKS, ...); with none of them, a group of one rank. Ranks meet over TCP: docs/protocol.md,
 * "Rendezvous", says at which address, and TERN_RENDEZVOUS=host:port overrides it. Collective. */
TERN_API tern_status tern_group_create_from_env(const tern_group_options* options, tern_group** group);

/* From the caller's own all-gather (MPI, torch.distributed, a store). `allgather` and `context` must live as long as the
 * group. Collective. */
TERN_API tern_status tern_group_create_from_allgather(const tern_group_options* options, int32_t rank, int32_t num_ranks,
                                                      tern_allgather_fn allgather, void* context, tern_group** group);

/* `num_ranks` ranks in this process, 1 to 1024: groups[r] is for the thread that plays rank r. Local: returns all of them at once. */
TERN_API tern_status tern_group_create_local(const tern_group_options* options, int32_t num_ranks, tern_group** groups);

/* Local, any thread. */
TERN_API tern_status tern_group_get_info(const tern_group* group, tern_group_info* info);

/* Never collective, never waits. NULL is allowed. Exchanges made from the group stay valid: handles of groups, exchanges and plans may be
 * destroyed in any order. */
TERN_API void tern_group_destroy(tern_group* group);

/* ---------------------------------------------------------------------------------------------------------- exchange */

typedef struct tern_exchange_options {
  size_t struct_size TERN_SIZE_OF(tern_exchange_options);
  tern_device_type device TERN_ZERO;
  /* CUDA device; -1 or 0 with AUTO: the rank's index on its host, modulo the devices. TERN_UNSUPPORTED: GPUs that do
   * not reach each other's memory, and processes that share one, where their kernels take turns and each wait takes milliseconds, unless
   * the environment has TERN_SHARE_GPU=1 */
  int32_t device_index TERN_ZERO;
  /* Internal staging of this rank, all lanes together. 0: computed from the shapes below so that a dispatch and a combine
   * of them fit one round (bounded by TERN_STAGING_MAX_MB, beyond which they run in rounds). A send must fit one round. A combine in mode
   * EXACT sends a row per entry: for its sends, count each token max_topk times in max_tokens. Between nodes there is as much again for
   * what crosses the network; on GPU ranks, for rows of small batches, at most as much for each node */
  int64_t staging_bytes TERN_ZERO;
  int64_t window_bytes TERN_ZERO;  /* memory for tern_window_alloc; 0: none */
  int64_t max_tokens TERN_ZERO;    /* shapes to be expected, per rank; all 0: 128 tokens of 16 KiB, top-8 of 256 experts */
  int64_t max_row_bytes TERN_ZERO; /* the longest row, scales included */
  int32_t max_topk TERN_ZERO;
  int32_t max_experts TERN_ZERO;
  int32_t num_lanes TERN_ZERO; /* 0: 1; at most 16 */
  /* GPU: SMs that an operation takes (a route fewer) if its launch does not say, 0: chosen (docs/design.md says how). At most this
   * rank's share of the GPU. The fewest that any rank asks for count where all ranks must choose alike: fewer SMs, smaller batches on the
   * latency path. Ignored on CPU ranks */
  int32_t num_sms TERN_ZERO;
  /* Of every wait of its operations; 0: TERN_TIMEOUT_MS, else 30000. GPU: of every wait of a kernel, counted from when it begins to wait. A
   * route with extent EXACT gives up after twice that and a second if work before it on the stream keeps it from running */
  int64_t timeout_ms TERN_ZERO;
  tern_timeout_policy on_timeout TERN_ZERO;
  tern_mode mode TERN_ZERO;
} tern_exchange_options;

typedef struct tern_memory_info {
  size_t struct_size TERN_SIZE_OF(tern_memory_info);
  int64_t control_bytes TERN_ZERO; /* flags, error records */
  int64_t staging_bytes TERN_ZERO; /* slots, both banks of all lanes; between nodes also the banks of the network */
  int64_t window_bytes TERN_ZERO;  /* what tern_window_alloc can give */
  int64_t total_bytes TERN_ZERO;   /* per rank */
} tern_memory_info;

/* What an exchange with these options would take on each rank. Local; allocates nothing. In a build without the CUDA engine, which alone
 * knows, TERN_DEVICE_CUDA has control_bytes 0 and in staging_bytes only the banks of the network, with TERN_OK. */
TERN_API tern_status tern_exchange_query_memory(const tern_group* group, const tern_exchange_options* options, tern_memory_info* info);

/* Makes the windows and maps those of the other ranks. Every rank passes equal options (device_index and num_sms aside): they and the
 * version are compared, and a difference is TERN_MISMATCH. Collective. */
TERN_API tern_status tern_exchange_create(tern_group* group, const tern_exchange_options* options, tern_exchange** exchange);

/* Never collective. NULL is allowed. The exchange ends, and waits as said here, with the last of this handle and those of its plans; window
 * memory is freed before this handle is destroyed, or with the exchange. Waits for nothing that other ranks' callers have to do;
 * between nodes, until what this rank has sent is with its receivers, at most timeout_ms, and after a failure a second. GPU: waits until the
 * operations that were enqueued outside of graphs have ended, at most twice timeout_ms; if they have not, its memory is lost. */
TERN_API void tern_exchange_destroy(tern_exchange* exchange);

/* What an exchange came to be. */
typedef struct tern_exchange_info {
  size_t struct_size TERN_SIZE_OF(tern_exchange_info);
  tern_device_type device TERN_ZERO; /* never AUTO */
  int32_t device_index TERN_ZERO;    /* the CUDA device; 0 on CPU ranks */
  int32_t num_lanes TERN_ZERO;
  int32_t reserved TERN_ZERO;
  int64_t timeout_ms TERN_ZERO; /* the deadline of its waits */
} tern_exchange_info;

/* Local, any thread. */
TERN_API tern_status tern_exchange_get_info(const tern_exchange* exchange, tern_exchange_info* info);

/* Memory inside this rank's window, aligned to 256 bytes: what lies there is used in place by the other ranks (zero copy). CPU ranks
 * push, so that is the outputs of dispatch and the rows of combine. GPU ranks pull, so it is the tokens and scales of dispatch and the
 * rows of combine, and in rank_major the outputs of dispatch besides; each argument and rank by itself. Local: ranks may allocate different
 * sizes in different orders. TERN_OUT_OF_MEMORY says how much is left. Thread-safe. Nobody writes there while a recovery runs. */
TERN_API tern_status tern_window_alloc(tern_exchange* exchange, int64_t bytes, void** pointer);
/* Gives it back, when no operation uses it any more. NULL is allowed; any other pointer that is not allocated is TERN_INVALID_ARGUMENT.
 * Local, thread-safe. */
TERN_API tern_status tern_window_free(tern_exchange* exchange, void* pointer);

typedef enum tern_health TERN_ENUM_TYPE {
  TERN_HEALTH_OK = 0,
  TERN_HEALTH_DEGRADED = 1, /* works, without the masked ranks */
  TERN_HEALTH_FAILED = 2    /* every operation returns the recorded error until tern_exchange_recover */
} tern_health;

/* What the error record holds: "rank `waiter` waited for rank `awaited` in `operation`, lane, epoch `expected`, saw `seen`". */
typedef struct tern_failure {
  tern_status status TERN_ZERO; /* TERN_OK: none */
  int32_t waiter TERN_ZERO;
  int32_t awaited TERN_ZERO;
  int32_t lane TERN_ZERO;
  int32_t operation TERN_ZERO; /* a tern_operation */
  int32_t reserved TERN_ZERO;
  uint64_t expected_epoch TERN_ZERO;
  uint64_t seen_epoch TERN_ZERO;
} tern_failure;

typedef enum tern_operation TERN_ENUM_TYPE {
  TERN_OP_NONE = 0,
  TERN_OP_ROUTE = 1,
  TERN_OP_DISPATCH = 2,
  TERN_OP_WEIGHTS = 3, /* the owner's weights on their way to the experts' ranks, first part of a combine */
  TERN_OP_COMBINE = 4,
  TERN_OP_RECOVER = 5
} tern_operation;

typedef struct tern_exchange_state {
  size_t struct_size TERN_SIZE_OF(tern_exchange_state);
  tern_health health TERN_ZERO;
  uint32_t generation TERN_ZERO; /* 0 at creation, grows with every recovery */
  /* Of the current generation. GPU ranks, with a health that is not FAILED: the last notice (CAPACITY_EXCEEDED, INVALID_ARGUMENT) of this
   * rank itself, by the route that found it; expected_epoch says which. It stays until there is another one, or the next generation */
  tern_failure failure TERN_ZERO;
  /* [rank] 1: masked out, or given up by an operation under TERN_ON_TIMEOUT_MASK. Groups are at most 1024 ranks in one exchange */
  uint8_t masked[1024] TERN_ZERO;
} tern_exchange_state;

/* Local, any thread, no wait: also while an operation runs. */
TERN_API tern_status tern_exchange_get_state(const tern_exchange* exchange, tern_exchange_state* state);

typedef struct tern_recover_options {
  size_t struct_size TERN_SIZE_OF(tern_recover_options);
  int64_t timeout_ms TERN_ZERO;  /* 0: the exchange's */
  const uint8_t* mask TERN_ZERO; /* [num_ranks] 1: go on without this rank, whether or not it answers; NULL: none */
  int32_t allow_mask TERN_ZERO;  /* 1: ranks that do not answer in time are masked out; 0: that is TERN_TIMEOUT */
  /* 1: ranks that are masked out, and call this with readmit too, are let in again. Each of them is waited for until the timeout; who does
   * not come stays masked, which is no error */
  int32_t readmit TERN_ZERO;
} tern_recover_options;

/* Starts a new generation: the ranks that call agree on who goes on, get fresh internal windows, and epochs start again, so that a
 * rank that was only stopped cannot write into what now belongs to others. Contents and addresses of tern_window_alloc memory are kept.
 * Plans routed before are stale. From then on a masked rank sends nothing, receives nothing, and entries routed to its experts count as
 * -1: its share is zero, and tern_exchange_get_state reports it. A masked rank that comes back gets TERN_MASKED_OUT,
 * until it and all who go on call this with readmit: then it has a share again, with its exchange and its window memory as they were.
 * Between nodes a masked rank's rail is out of service: entries of tokens of the ranks with its index in other nodes count as -1 where they
 * name experts on its node, and in tern_plan_info.pair_counts such ranks are zeros there. Where the network is cut in two, each side can go
 * on alone.
 * Collective among those who go on; no operation of this exchange may be running on the calling rank. GPU: waits until those that are
 * enqueued have ended, but for replays of graphs, which the caller waits for; graphs that hold operations must be captured again. */
TERN_API tern_status tern_exchange_recover(tern_exchange* exchange, const tern_recover_options* options);

typedef struct tern_metrics {
  size_t struct_size TERN_SIZE_OF(tern_metrics);
  uint64_t num_routes TERN_ZERO;
  uint64_t num_dispatches TERN_ZERO;
  uint64_t num_combines TERN_ZERO;
  uint64_t rounds TERN_ZERO;           /* trips through the staging banks, all operations */
  uint64_t sent_bytes TERN_ZERO;       /* payload, scales and metadata written to other ranks */
  uint64_t sent_local_bytes TERN_ZERO; /* the same, to this rank itself */
  uint64_t received_rows TERN_ZERO;
  uint64_t waits TERN_ZERO;  /* times a flag was not there yet */
  uint64_t sleeps TERN_ZERO; /* of these, times the thread went to sleep */
  uint64_t wait_ns TERN_ZERO;
  uint64_t timeouts TERN_ZERO;
  uint64_t network_bytes TERN_ZERO; /* put to ranks of other nodes: payload, scales and metadata, without what the network adds */
} tern_metrics;

/* Counters since creation, all lanes. Local, any thread. GPU ranks count the first three, rounds (a send and its
 * receive each), and received_rows where the host knows them (extent EXACT), as calls: replays of graphs are not seen. Their timeouts are
 * the ranks that are given up in this generation; network_bytes are counted as between CPU ranks, those of replays too; the rest is 0. */
TERN_API tern_status tern_exchange_get_metrics(const tern_exchange* exchange, tern_metrics* metrics);

/* -------------------------------------------------------------------------------------------------------------- plan */

typedef struct tern_plan_options {
  size_t struct_size TERN_SIZE_OF(tern_plan_options);
  int64_t max_tokens TERN_ZERO;  /* the most tokens that any rank routes, > 0, equal on all ranks */
  int32_t num_experts TERN_ZERO; /* > 0, divisible by the number of ranks; expert e lives on rank e / E_l */
  int32_t num_topk TERN_ZERO;    /* 1..64; with token_in_rank routing: 0 */
  tern_layout layout TERN_ZERO;
  tern_extent extent TERN_ZERO;
  int32_t expert_alignment TERN_ZERO; /* expert_major: rows of a group are padded to a multiple of it; 0: 1 */
  int32_t zero_padding
      TERN_ZERO; /* 1: dispatch writes zeros (scales too) into padding rows: to the end of each group, in expert_padded to the end of each expert */
  int64_t row_capacity
      TERN_ZERO; /* worst: rows of the outputs, equal on all ranks; 0: what can arrive at most. expert_padded: always E_l * num_ranks * max_tokens */
} tern_plan_options;

/* Room for the routing of one batch. Local. All memory that operations along it need is allocated here. GPU: also while a graph is captured. */
TERN_API tern_status tern_plan_create(tern_exchange* exchange, const tern_plan_options* options, tern_plan** plan);
/* Never collective, waits for nothing, unless it is the last handle of its exchange. GPU: operations that are enqueued
 * still run; graphs that hold some must not be replayed any more. */
TERN_API void tern_plan_destroy(tern_plan* plan);

typedef struct tern_routing {
  size_t struct_size TERN_SIZE_OF(tern_routing);
  const void* topk_idx TERN_ZERO; /* [num_tokens, num_topk] global expert numbers, -1: none. Duplicates count each */
  tern_index_type topk_idx_type TERN_ZERO;
  int32_t reserved TERN_ZERO;
  int64_t num_tokens TERN_ZERO;           /* 0..max_tokens; may differ between ranks */
  const uint8_t* token_in_rank TERN_ZERO; /* instead of topk_idx, rank_major only: [num_tokens, num_ranks], nonzero: goes there */
  const int32_t* tokens_per_expert
      TERN_ZERO; /* with token_in_rank, optional: [num_experts], reported as received counts at the experts' ranks */
  /* GPU: where the operation finds the number of tokens, in device memory, at the time it runs; num_tokens is then the most that
   * may stand there. For graphs whose batches differ in size. NULL: num_tokens */
  const int32_t* device_num_tokens TERN_ZERO;
} tern_routing;

/* How an operation runs. NULL where a function takes one: all defaults. */
typedef struct tern_launch {
  size_t struct_size TERN_SIZE_OF(tern_launch);
  void* stream TERN_ZERO; /* GPU: cudaStream_t; ignored on CPU ranks */
  int32_t lane TERN_ZERO;
  tern_phase phase TERN_ZERO; /* route: WHOLE only */
  int32_t num_sms TERN_ZERO;  /* GPU: 0: the exchange's, or chosen; ranks may differ. See tern_plan_info.num_sms */
  /* GPU: 1: runs on the exchange's own stream of this lane, so that it overlaps with what `stream` does next. It starts after
   * `after_event`, or if that is NULL after what is on `stream` by now; whoever needs the results waits for `done_event`, and so must
   * the next operation of the lane that runs elsewhere, and a stream that is being captured. */
  int32_t own_stream TERN_ZERO;
  void* after_event TERN_ZERO; /* GPU: a cudaEvent_t that the operation waits for; NULL: none */
  void* done_event TERN_ZERO;  /* GPU: a cudaEvent_t of the caller, recorded behind the operation; NULL: none */
} tern_launch;

/* What the host knows of a routed plan. With extent WORST on a GPU the counts are not known to the host: num_received is -1, arrays are
 * NULL, and num_tokens is -1 if device_num_tokens was given; num_rows is the capacity. */
typedef struct tern_plan_info {
  size_t struct_size TERN_SIZE_OF(tern_plan_info);
  int64_t num_tokens TERN_ZERO;   /* routed by this rank */
  int64_t num_received TERN_ZERO; /* (token, rank) messages that arrive here: the rows of rank_major */
  int64_t num_rows TERN_ZERO;     /* rows the outputs must have: exact: as counted, padding included; worst: the capacity */
  int64_t row_capacity TERN_ZERO; /* most rows that can be asked for by any routing of this plan's options */
  uint32_t generation TERN_ZERO;
  /* GPU ranks of one node: 1: the last operation took the latency path, 0: throughput. CPU ranks, and GPU ranks between nodes: 1: the last
   * dispatch routed and sent its rows in one round. A combine does not change it on CPU ranks; between nodes it makes it 0 on GPU ranks */
  int32_t latency_path TERN_ZERO;
  const int32_t* received_per_rank TERN_ZERO;   /* [num_ranks] messages by source rank */
  const int32_t* received_per_expert TERN_ZERO; /* [E_l] entries by local expert, not padded; or what tokens_per_expert said */
  const int32_t* sent_per_rank TERN_ZERO;       /* [num_ranks] messages by destination */
  const int32_t* pair_counts TERN_ZERO;         /* [num_ranks, num_ranks] messages from row rank to column rank */
  int32_t num_sms TERN_ZERO;                    /* GPU: of the last operation; 0: CPU */
  int32_t reserved TERN_ZERO;
  /* Several nodes, what this rank passes on within its node: its own tokens, and those of its rail in every other node. NULL with one node, and on GPU
   * ranks */
  const int32_t* rail_tokens TERN_ZERO; /* [num_nodes] tokens that have a message to this rank's node, by their owner's node */
  /* [sum of rail_tokens, ranks of the node] 1: the token goes to that rank of the node. By owner's node, then by token */
  const uint8_t* rail_token_in_rank TERN_ZERO;
} tern_plan_info;

/* Exchanges counts, after which this rank knows where every row goes and what it will receive. `info` may be NULL. The
 * arrays in it belong to the plan and hold until it is routed again. GPU: with extent EXACT it returns when the host has the counts,
 * with WORST at once. Collective. */
TERN_API tern_status tern_plan_route(tern_plan* plan, const tern_routing* routing, const tern_launch* launch, tern_plan_info* info);

/* The same information again. Local. TERN_INVALID_STATE if the plan is not routed. */
TERN_API tern_status tern_plan_get_info(const tern_plan* plan, tern_plan_info* info);

/* tern_plan_info.row_capacity, known from the start: the rows that outputs with extent WORST must have. Local. */
TERN_API tern_status tern_plan_get_row_capacity(const tern_plan* plan, int64_t* num_rows);

/* Counts of a routing by itself, without any exchange: a pure function of its inputs. Each output may be NULL. Local. GPU: on `stream`; it
 * can be captured in a graph. Of the launch nothing else is used, but lane and phase must be some that there are. An index that is no expert
 * is TERN_INVALID_ARGUMENT on CPU ranks and counts as -1 on GPU ranks. device_num_tokens is not looked at. */
typedef struct tern_routing_counts {
  size_t struct_size TERN_SIZE_OF(tern_routing_counts);
  int32_t* tokens_per_rank TERN_ZERO;   /* [num_ranks] */
  int32_t* tokens_per_node TERN_ZERO;   /* [num_nodes] */
  int32_t* tokens_per_expert TERN_ZERO; /* [num_experts] entries */
  uint8_t* token_in_rank TERN_ZERO;     /* [num_tokens, num_ranks] */
} tern_routing_counts;
TERN_API tern_status tern_count_routing(tern_exchange* exchange, const tern_routing* routing, int32_t num_experts, int32_t num_topk,
                                        const tern_launch* launch, const tern_routing_counts* counts);

/* ---------------------------------------------------------------------------------------------------------- dispatch */

typedef struct tern_dispatch_args {
  size_t struct_size TERN_SIZE_OF(tern_dispatch_args);
  /* Routes the plan in the same operation (fewer trips for small batches; extent WORST only, since outputs exist already). NULL: the plan is routed */
  const tern_routing* routing TERN_ZERO;

  /* What goes out. */
  /* [num_tokens, hidden]; NULL allowed only with 0 tokens. GPU: pulled in place where they lie in window memory, with encoding AS_GIVEN and
   * phase WHOLE and no send of the lane under way; the operation then ends when every rank has its rows. Otherwise they are staged */
  const void* tokens TERN_ZERO;
  tern_dtype dtype TERN_ZERO;
  tern_encoding encoding TERN_ZERO;
  int64_t hidden TERN_ZERO;             /* > 0; a row is a multiple of 16 bytes (after a cast too) */
  int64_t token_stride_bytes TERN_ZERO; /* 0: dense */
  /* AS_GIVEN: [num_tokens, scale_bytes] opaque; NULL: none. GPU: pulled in place as tokens are, if address, scale_bytes and token stride
   * are multiples of 16 and elements follow each other; otherwise staged */
  const void* scales TERN_ZERO;
  int64_t scale_bytes
      TERN_ZERO; /* AS_GIVEN: bytes of scales per token, > 0 with scales; equal on all ranks, also on those with no tokens */
  int64_t scale_element_bytes
      TERN_ZERO; /* granule that COLUMN_MAJOR transposes and strides count; 0: 4, or 1 where scale_bytes is no multiple of 4 */
  int64_t scale_token_stride_bytes TERN_ZERO;   /* 0: dense */
  int64_t scale_element_stride_bytes TERN_ZERO; /* 0: scale_element_bytes */
  /* [num_tokens, num_topk]; NULL: none. Given by all ranks or by none (carry_weights). GPU: always staged */
  const float* topk_weights TERN_ZERO;
  int32_t carry_weights TERN_ZERO; /* 1: weights travel; a rank without tokens sets it too. 0: as topk_weights != NULL */

  /* What comes in. rows = tern_plan_info.num_rows (exact), row_capacity (worst). Each may be NULL except out_tokens where the outputs have rows.
   * Counts, offsets and ranges are those of the routing, also where rows were left out for want of capacity. */
  tern_scale_order out_scale_order TERN_ZERO;
  /* [rows, hidden]. CPU: window memory on every rank (zero copy), or on none; see zero_copy. GPU: any. In rank_major, where this and
   * out_scales are window memory, ranks whose tokens are in place write here while the operation runs; if it fails, until the recovery */
  void* out_tokens TERN_ZERO;
  void* out_scales TERN_ZERO; /* scales as they arrive, by out_scale_order */
  int32_t* out_topk_idx
      TERN_ZERO; /* rank_major: [rows, num_topk] local expert, -1 where the entry is not of this rank; all -1 in unused rows (worst) */
  float* out_topk_weights TERN_ZERO;     /* rank_major: [rows, num_topk], 0 where -1; expert layouts: [rows], the entry's weight */
  int32_t* out_source_token TERN_ZERO;   /* [rows] index of the token on its rank; -1 in padding and unused rows */
  int32_t* out_source_rank TERN_ZERO;    /* [rows]; -1 likewise */
  int32_t* out_row_expert TERN_ZERO;     /* expert layouts: [rows] local expert; -1 likewise */
  int64_t* out_expert_offsets TERN_ZERO; /* expert_major: [E_l + 1] first row of each expert's group, padding included */
  int32_t* out_expert_counts TERN_ZERO;  /* [E_l] rows (entries) of each expert, not padded */
  int32_t* out_rank_counts TERN_ZERO;    /* [num_ranks] messages from each rank */
  int64_t* out_expert_rank_ranges
      TERN_ZERO; /* expert layouts: [E_l, num_ranks] count in the low 32 bits, first row (in the expert's group) in the high */
  /* 1: out_tokens is window memory on every rank (a rank that receives no rows, and has none, sets it too). 0: as out_tokens lies.
   * GPU: 1 is checked on this rank, and changes nothing */
  int32_t zero_copy TERN_ZERO;
  int32_t reserved TERN_ZERO;
  /* [num_ranks] nanoseconds that this operation has waited for each rank are added, those of a receive by the receive; NULL: not counted. A
   * rank that was there when this one looked adds nothing; one that is given up adds the whole timeout. CPU ranks look at one rank after
   * the other, so what two late ones have in common counts for the first; a route in the operation is included. GPU: until the rank's
   * own kernel had begun, all ranks at the same time; a route is not included, nor is, between nodes, any rank of another node */
  int64_t* wait_ns TERN_ZERO;
} tern_dispatch_args;

/* Sends this rank's tokens to the ranks of their experts and receives what the others send. Complete when it returns (CPU) or in stream order
 * (GPU). WORST: rows beyond the capacity are left out and TERN_CAPACITY_EXCEEDED is returned (GPU: set in the state) after an
 * otherwise complete operation. Two sends may be under way on a lane before its first receive, with nothing else of the lane between
 * them. GPU on the throughput path, and between nodes where all tokens that the plan allows do not fit one round together with their
 * experts: a `routing` is an operation of its own, so two plans are routed before the first send; and a send with a routing waits (GPU: on
 * the stream) for the counts of all ranks. Collective. */
TERN_API tern_status tern_dispatch(tern_plan* plan, const tern_dispatch_args* args, const tern_launch* launch);

/* ----------------------------------------------------------------------------------------------------------- combine */

typedef struct tern_combine_args {
  size_t struct_size TERN_SIZE_OF(tern_combine_args);
  /* [rows, hidden] in the plan's layout. CPU: window memory on every rank (pulled in place), or on none. GPU: each rank by itself; rows in
   * window memory are pulled in place in rank_major or with mode EXACT, phase WHOLE and no send of the lane under way; the operation then
   * ends when every rank has pulled. Otherwise they are summed (expert layouts, HIERARCHICAL) or copied into the staging first. NULL only
   * where no rows arrive; GPU with WORST: never, since the host does not know */
  const void* rows TERN_ZERO;
  tern_dtype dtype TERN_ZERO; /* bf16, fp16 or fp32; also that of bias and out_tokens, and how rows travel unless `wire` says otherwise */
  tern_combine_mode mode TERN_ZERO;
  int64_t hidden TERN_ZERO;
  tern_weighting weighting TERN_ZERO; /* rank_major: TERN_WEIGHTS_NONE */
  int32_t carry_weights TERN_ZERO;    /* 1: row_weights travel; a rank that received no rows sets it too. 0: as row_weights != NULL */
  const float* topk_weights
      TERN_ZERO; /* WEIGHTS_OWNER: [num_tokens, num_topk]. HIERARCHICAL sends them ahead, and the experts' ranks wait for them before they
       send. In a round of their own, but on the latency path of GPU ranks on one node: no other send may be under way then */
  const float* row_weights TERN_ZERO; /* handed back to the owner: rank_major [rows, num_topk], expert layouts [rows]; NULL: none */
  const void* bias[2] TERN_ZERO;      /* [num_tokens, hidden] each, or NULL; added first, in this order */
  void* out_tokens TERN_ZERO;         /* [num_tokens, hidden] */
  /* [num_tokens, num_topk]: row_weights summed over ranks, ascending (within each node, then over nodes); needs weights that travel */
  float* out_topk_weights TERN_ZERO;
  /* 1: rows is window memory on every rank (a rank that received no rows, and has none, sets it too). 0: as rows lies. GPU: 1 is checked on
   * this rank, and changes nothing */
  int32_t zero_copy TERN_ZERO;
  tern_wire wire TERN_ZERO; /* not AS_DTYPE: rows are never pulled in place, since their owners do not have them like that */
  /* [num_ranks] nanoseconds that this operation has waited for each rank are added; NULL: not counted. See tern_dispatch_args.wait_ns */
  int64_t* wait_ns TERN_ZERO;
} tern_combine_args;

/* Brings one result per token back to its owner:
 *   out[t] = round(bias[0][t] + bias[1][t] + sum over ranks r, ascending, of wire(sum over k on r, ascending, of w[t,k] * row[t,k]))
 * in FP32, products and sums rounded separately, sums starting at +0, wire() rounding once as tern_combine_args.wire says, also for the rows
 * that stay on their rank.
 * With several nodes the sum is over nodes, ascending, of wire(sum over the ranks of the node, ascending, of wire(...)).
 * EXACT: one sum over all k in ascending order; rows travel as they are, so that there is no rounding but with LOG10BIT, where each row is
 * encoded: w[t,k] * wire(row[t,k]); on rank_major the same as HIERARCHICAL. Tokens without any entry get the bias,
 * or zeros. The plan must have been dispatched once. Collective. */
TERN_API tern_status tern_combine(tern_plan* plan, const tern_combine_args* args, const tern_launch* launch);

/* ---------------------------------------------------------------------------------------------------------- timeline */

/* Where an exchange spends its time: spans of a clock that all processes of a host share, so that those of several ranks go side by side.
 *
 *   tern_trace_start(exchange, 0);
 *   ... operations ...
 *   tern_trace_stop(exchange);
 *   tern_trace_read(exchange, NULL, 0, &num_spans, NULL);
 *   tern_trace_read(exchange, spans, num_spans, &num_spans, &num_dropped);
 *
 * The spans of a lane follow each other, or one lies within the other. While nothing is recorded they cost next to nothing. */
typedef enum tern_span_kind TERN_ENUM_TYPE {
  TERN_SPAN_OPERATION = 0, /* a whole call: a route, dispatch, combine or recovery. The others are parts of one */
  TERN_SPAN_PLAN = 1,      /* work on the routing: counting, and finding where each row goes */
  TERN_SPAN_SEND = 2,      /* writing a round's messages to all ranks. Rows that are summed before they are sent are summed here */
  TERN_SPAN_WAIT = 3,      /* for a rank that had not come so far when this one looked */
  TERN_SPAN_RECEIVE = 4,   /* putting in place what a rank has sent in a round; peer -1: filling in what nobody sends */
  TERN_SPAN_REDUCE = 5     /* combine: summing the rows of a round's tokens at their owner */
} tern_span_kind;

/* What a rank waits for. */
typedef enum tern_awaited TERN_ENUM_TYPE {
  TERN_AWAITED_NOTHING = 0,
  TERN_AWAITED_MESSAGES = 1, /* those of the epoch */
  TERN_AWAITED_ADDRESS = 2,  /* zero copy: where the peer's rows are, and that they may be used */
  TERN_AWAITED_CONSUMED = 3, /* that the peer has taken what it was sent up to the epoch */
  TERN_AWAITED_OWN_GPU = 4   /* GPU, route with extent EXACT: the counts of all ranks */
} tern_awaited;

/* An element of an array, which keeps its size. */
typedef struct tern_span {
  int64_t begin_ns TERN_ZERO; /* of CLOCK_MONOTONIC */
  int64_t end_ns TERN_ZERO;
  uint64_t epoch TERN_ZERO; /* of SEND, WAIT, RECEIVE, REDUCE; starts again with each generation */
  /* SEND: written to all ranks, as tern_metrics counts them in sent_bytes and sent_local_bytes: what goes through the staging; between nodes
   * also of what a dispatch puts to other nodes, as in network_bytes, with the rail's epoch. RECEIVE:
   * the same, from the peer. REDUCE: of the rows that were summed. Otherwise 0 */
  int64_t bytes TERN_ZERO;
  tern_span_kind kind TERN_ZERO;
  tern_operation operation TERN_ZERO; /* parts of a dispatch may be of ROUTE, parts of a combine of WEIGHTS */
  tern_phase phase TERN_ZERO;         /* of OPERATION */
  int32_t lane TERN_ZERO;             /* recoveries that are called for: 0 */
  int32_t peer TERN_ZERO;             /* WAIT: the rank waited for; RECEIVE: the sender; else -1 */
  tern_awaited awaited TERN_ZERO;     /* of WAIT */
  tern_status status TERN_ZERO; /* OPERATION, WAIT: how it ended. A WAIT that ends in TERN_TIMEOUT need not end the operation (MASK) */
  int32_t reserved TERN_ZERO;
} tern_span;

/* Starts a recording, and drops what was recorded before. Each lane has room for `capacity` spans, at most 2^24; 0: 65536, which is 4 MiB.
 * All memory is allocated here. GPU ranks record the calls themselves, which enqueue, and what the host waits for; what runs on the GPU,
 * and when, is seen by Nsight Systems. Local; no operation of this exchange may be running on the calling rank. */
TERN_API tern_status tern_trace_start(tern_exchange* exchange, int64_t capacity);

/* Ends the recording, if there is one; what was recorded stays. A span that has begun is still recorded when it ends. Local, any thread,
 * also while operations run. */
TERN_API tern_status tern_trace_stop(tern_exchange* exchange);

/* Copies what was recorded to spans[capacity], lane after lane, in each lane in the order in which spans ended; of a recording that goes
 * on, those that have ended. `num_spans` gets how many there are, also if that is more than `capacity` and the rest was not copied; `spans`
 * may be NULL with capacity 0. `num_dropped`, which may be NULL, gets how many found no room on their lane: those that ended last. Local,
 * any thread, also while operations run. */
TERN_API tern_status tern_trace_read(const tern_exchange* exchange, tern_span* spans, int64_t capacity, int64_t* num_spans,
                                     int64_t* num_dropped);

#ifdef __cplusplus
}
#endif
#endif /* TERN_TERN_H_ */

"""The kernel as Metal source, built with `mx.fast.metal_kernel`: one pass over the row.

Each thread keeps (m, s, t, u) as `packed_row` defines them for the values it reads, and moves the
sums to a new reference m when a larger value comes. Each SIMD group keeps its k largest values in
order, one per lane (WarpSelect of Faiss, arXiv 1702.08734). Both are merged in the same way between
lanes, SIMD groups and threadgroups. With few rows several threadgroups share a row; a second
dispatch of one SIMD group then merges their parts.

The text is ASCII, casts every load to float and passes no pointers to functions, because encodings,
half types and address spaces differ between Metal versions, chips and input sizes. `tests/metal`
runs it on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from mlxroute.small.kernels.packed_row import (
    HEADER_SIZE,
    LARGEST_FLOAT,
    LOG2_E,
    LOWEST_EXPONENT,
    TOP_K,
    top_count,
)

# Threads of a threadgroup: within every chip's limit for a kernel of this size.
_THREADS = 256
# Values per threadgroup: a longer row is shared, by one threadgroup per lane of the merge at most.
_SHARE_SIZE = 8192
_MAX_SHARES = 32
# What a threadgroup leaves for the merge: m, s, t, u, whether it read a NaN, ids, values.
_PART_SIZE = 5 + 2 * TOP_K

_CONSTANTS = f"""
static constant constexpr const uint TOP = {TOP_K}u;
static constant constexpr const uint THREADS = {_THREADS}u;
static constant constexpr const uint GROUPS = THREADS / 32u;
static constant constexpr const uint AT_ONCE = 4u;
static constant constexpr const uint PART = {_PART_SIZE}u;
static constant constexpr const uint NOBODY = 0xFFFFFFFFu;
static constant constexpr const float LARGEST = {LARGEST_FLOAT}f;
static constant constexpr const float LOG2_E = {LOG2_E}f;
static constant constexpr const float LOWEST = {LOWEST_EXPONENT}f;
"""

_FUNCTIONS = """
struct Moments { float m; float s; float t; float u; };
struct Best { float value; uint id; };

// y = (x - m) log2(e), so that infinite values count as the largest finite ones.
inline float exponent(float x, float m) {
  return metal::min(metal::max((x - m) * LOG2_E, LOWEST), 0.0f);
}

inline Moments moved(Moments a, float m) {
  const float d = exponent(a.m, m);
  const float e = metal::precise::exp2(d);
  Moments moment;
  moment.m = m;
  moment.u = (a.u + 2.0f * d * a.t + d * d * a.s) * e;
  moment.t = (a.t + d * a.s) * e;
  moment.s = a.s * e;
  return moment;
}

inline Moments simd_merged(Moments a) {
  Moments moment = moved(a, simd_max(a.m));
  moment.s = simd_sum(moment.s);
  moment.t = simd_sum(moment.t);
  moment.u = simd_sum(moment.u);
  return moment;
}

inline bool better(float value, uint id, Best than) {
  return value > than.value || (value == than.value && id < than.id);
}

// Offers each lane's value to the SIMD group's list; `last` is the list's last place.
inline Best offered(Best list, float value, uint id, uint lane, uint last) {
  Best worst;
  worst.value = simd_shuffle(list.value, ushort(last));
  worst.id = simd_shuffle(list.id, ushort(last));
  bool has_better = better(value, id, worst);
  while (simd_any(has_better)) {
    const uint first = simd_min(has_better ? lane : 32u);
    const float new_value = simd_shuffle(value, ushort(first));
    const uint new_id = simd_shuffle(id, ushort(first));
    Best above;
    above.value = simd_shuffle_up(list.value, ushort(1));
    above.id = simd_shuffle_up(list.id, ushort(1));
    if (better(new_value, new_id, list)) {
      const bool pushed = lane > 0u && better(new_value, new_id, above);
      list.value = pushed ? above.value : new_value;
      list.id = pushed ? above.id : new_id;
    }
    worst.value = simd_shuffle(list.value, ushort(last));
    worst.id = simd_shuffle(list.id, ushort(last));
    has_better = has_better && lane != first && better(value, id, worst);
  }
  return list;
}
"""

# Writes the packed row from the `moments`, `best` and `nan_seen` of one SIMD group.
_FINISH = f"""
    const float lse = float(T(moments.m + metal::precise::log(moments.s)));
    const float rounded = float(T(best.value - lse));
    const float best_rounded = simd_shuffle(rounded, ushort(0));
    // In half precision the lowest of the ids that share the best rounded logprob.
    const bool ties = sizeof(T) < 4 && !nan_seen && lane < k && rounded == best_rounded;
    const uint token = simd_min(lane == 0u || ties ? best.id : NOBODY);
    const float token_logit = simd_max(best.id == token ? best.value : -INFINITY);
    const size_t place = size_t(row) * ({HEADER_SIZE}u + 2u * k);
    if (lane == 0u) {{
      packed[place] = float(token);
      packed[place + 1u] = token_logit;
      packed[place + 2u] = nan_seen ? NAN : moments.s;
      packed[place + 3u] = nan_seen ? NAN : moments.t;
      packed[place + 4u] = nan_seen ? NAN : moments.u;
    }}
    if (lane < k) {{
      packed[place + {HEADER_SIZE}u + lane] = float(best.id);
      packed[place + {HEADER_SIZE}u + k + lane] = best.value;
    }}
"""

# Reads the row, then reduces it to the first SIMD group of each threadgroup.
_READ = """
  const uint lid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint group = simdgroup_index_in_threadgroup;
  const uint row = threadgroup_position_in_grid.y;
  const uint share = threadgroup_position_in_grid.x;
  const uint shares = threadgroups_per_grid.x;
  const uint size = uint(logits_shape[1]);
  const uint k = metal::min(TOP, size);
  const uint length = (size + shares - 1u) / shares;
  const uint begin = share * length;
  const uint end = metal::min(begin + length, size);
  const size_t offset = size_t(row) * size_t(size);
  threadgroup float group_m[GROUPS];
  threadgroup float group_s[GROUPS];
  threadgroup float group_t[GROUPS];
  threadgroup float group_u[GROUPS];
  threadgroup uint group_nan[GROUPS];
  threadgroup float group_values[GROUPS * TOP];
  threadgroup uint group_ids[GROUPS * TOP];

  Moments moments = {-LARGEST, 0.0f, 0.0f, 0.0f};
  Best best = {-INFINITY, NOBODY};
  Best worst = best;
  bool nan_seen = false;
  // The same number of rounds for every thread: SIMD functions need all lanes.
  for (uint at = begin; at < end; at += THREADS * AT_ONCE) {
    float values[AT_ONCE];
    uint ids[AT_ONCE];
    float largest = moments.m;
    bool has_better = false;
    for (uint i = 0u; i < AT_ONCE; i++) {
      const uint id = at + i * THREADS + lid;
      float value = -INFINITY;
      if (id < end) value = float(logits[offset + id]);
      nan_seen = nan_seen || metal::isnan(value);
      values[i] = metal::isnan(value) ? -INFINITY : value;
      ids[i] = id < end ? id : NOBODY;
      largest = metal::max(largest, metal::min(values[i], LARGEST));
      has_better = has_better || better(values[i], ids[i], worst);
    }
    moments = moved(moments, largest);
    for (uint i = 0u; i < AT_ONCE; i++) {
      const float y = exponent(values[i], largest);
      const float weight = metal::precise::exp2(y);
      moments.s += weight;
      moments.t += y * weight;
      moments.u += y * y * weight;
    }
    if (simd_any(has_better)) {
      for (uint i = 0u; i < AT_ONCE; i++) best = offered(best, values[i], ids[i], lane, k - 1u);
      worst.value = simd_shuffle(best.value, ushort(k - 1u));
      worst.id = simd_shuffle(best.id, ushort(k - 1u));
    }
  }
  moments = simd_merged(moments);
  nan_seen = simd_any(nan_seen);
  if (lane == 0u) {
    group_m[group] = moments.m;
    group_s[group] = moments.s;
    group_t[group] = moments.t;
    group_u[group] = moments.u;
    group_nan[group] = nan_seen ? 1u : 0u;
  }
  if (lane < TOP) {
    group_values[group * TOP + lane] = best.value;
    group_ids[group * TOP + lane] = best.id;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (group == 0u) {
    Moments empty = {-LARGEST, 0.0f, 0.0f, 0.0f};
    moments = empty;
    nan_seen = false;
    if (lane < GROUPS) {
      moments.m = group_m[lane];
      moments.s = group_s[lane];
      moments.t = group_t[lane];
      moments.u = group_u[lane];
      nan_seen = group_nan[lane] != 0u;
    }
    moments = simd_merged(moments);
    nan_seen = simd_any(nan_seen);
    best.value = -INFINITY;
    best.id = NOBODY;
    for (uint at = 0u; at < GROUPS * TOP; at += 32u) {
      best = offered(best, group_values[at + lane], group_ids[at + lane], lane, k - 1u);
    }
"""

_SHARE_SOURCE = (
    _READ
    + """
    const size_t place = (size_t(row) * shares + share) * PART;
    if (lane == 0u) {
      parts[place] = moments.m;
      parts[place + 1u] = moments.s;
      parts[place + 2u] = moments.t;
      parts[place + 3u] = moments.u;
      parts[place + 4u] = nan_seen ? 1.0f : 0.0f;
    }
    if (lane < TOP) {
      parts[place + 5u + lane] = float(best.id);
      parts[place + 5u + TOP + lane] = best.value;
    }
  }
"""
)

_WHOLE_SOURCE = _READ + _FINISH + "  }\n"

_MERGE_SOURCE = (
    """
  const uint lane = thread_index_in_simdgroup;
  const uint row = threadgroup_position_in_grid.y;
  const uint shares = uint(parts_shape[1]);
  const uint k = TOP;
  const size_t offset = size_t(row) * shares * PART;
  Moments moments = {-LARGEST, 0.0f, 0.0f, 0.0f};
  Best best = {-INFINITY, NOBODY};
  bool nan_seen = false;
  if (lane < shares) {
    const size_t part = offset + lane * PART;
    moments.m = parts[part];
    moments.s = parts[part + 1u];
    moments.t = parts[part + 2u];
    moments.u = parts[part + 3u];
    nan_seen = parts[part + 4u] != 0.0f;
  }
  moments = simd_merged(moments);
  nan_seen = simd_any(nan_seen);
  for (uint at = 0u; at < shares * TOP; at += 32u) {
    const uint entry = at + lane;
    float value = -INFINITY;
    uint id = NOBODY;
    if (entry < shares * TOP) {
      const size_t part = offset + (entry / TOP) * PART + 5u + entry % TOP;
      id = uint(parts[part]);
      value = parts[part + TOP];
    }
    best = offered(best, value, id, lane, k - 1u);
  }
  {
"""
    + _FINISH
    + "  }\n"
)

# Name to (input, output, source): a row read by one threadgroup, a share of a row, the merge.
_KERNELS = {
    "whole": ("logits", "packed", _WHOLE_SOURCE),
    "share": ("logits", "parts", _SHARE_SOURCE),
    "merge": ("parts", "packed", _MERGE_SOURCE),
}


def pack_signals(logits: mx.array) -> mx.array:
    """Return the packed rows of logits [B, V] in float32, float16 or bfloat16, lazily."""
    batch, size = logits.shape
    width = HEADER_SIZE + 2 * top_count(size)
    shares = _count_shares(batch, size)
    grid = (shares * _THREADS, batch, 1)
    threads = (_THREADS, 1, 1)
    if shares == 1:
        return _run("whole", logits, (batch, width), grid, threads, logits.dtype)
    parts = _run("share", logits, (batch, shares, _PART_SIZE), grid, threads, logits.dtype)
    return _run("merge", parts, (batch, width), (32, batch, 1), (32, 1, 1), logits.dtype)


def _count_shares(batch: int, size: int) -> int:
    """Return how many threadgroups share a row: enough to keep a GPU busy with few rows."""
    return max(1, min(-(-size // _SHARE_SIZE), _MAX_SHARES // batch))


def _run(
    name: str,
    values: mx.array,
    shape: tuple[int, ...],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    dtype: mx.Dtype,
) -> mx.array:
    """Call a kernel on one input; `dtype` is the type T of the logits in its source."""
    (output,) = build_kernel(name)(
        inputs=[values],
        template=[("T", dtype)],
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape],
        output_dtypes=[mx.float32],
    )
    result: mx.array = output
    return result


@functools.cache
def build_kernel(name: str) -> Any:
    """Return the kernel object of one of `_KERNELS`, built once."""
    input_name, output_name, source = _KERNELS[name]
    return mx.fast.metal_kernel(
        name=f"mlxroute_signals_{name}",
        input_names=[input_name],
        output_names=[output_name],
        header=_CONSTANTS + _FUNCTIONS,
        source=source,
    )

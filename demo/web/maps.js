// Activation maps: what one position takes from the others, as
// mmvmamba/analysis/activation_maps.py has them, which says what the three kinds of weights are.

export const KINDS = {
  qk: "Q Kᵀ",
  weighted: "Q Kᵀ with the decay in between",
  contribution: "Q Kᵀ with the decay, times the step size",
};

/**
 * The weights of all positions for a query.
 *
 * @param {{Q, K, dt, A}} scans Of one image and block, each {data, shape}: (K, H, W, N) of Q and K,
 *   (K, H, W, D) of dt, (K, D, N) or (K, D, 1) of A.
 * @param {object[]} paths {column_major, reverse, per_line} of each path.
 * @param {number[]} query Row and column in the map.
 * @returns {object} For each kind `each`, a map {data, height, width} for each path, the means over
 *   channels, and `sum`, their sum, which the mixer takes.
 */
export function mapsOf({ Q, K, dt, A }, paths, query) {
  const [, height, width, channels] = dt.shape;
  const states = K.shape[3];
  const rates = A.shape[2];
  const found = {};
  for (const kind of Object.keys(KINDS)) {
    const blank = () => ({ data: new Float64Array(height * width), height, width });
    found[kind] = { each: paths.map(blank), sum: blank() };
  }
  const products = new Float64Array(states);
  paths.forEach((path, k) => {
    const places = placesOf(path, query, height, width);
    const at = k * height * width;
    const own = (at + places[0]) * states;
    // Of each channel, the sum of dt of the positions after one, up to the query.
    const after = new Float64Array(channels);
    for (const place of places) {
      let qk = 0;
      for (let n = 0; n < states; n++) {
        products[n] = Q.data[own + n] * K.data[(at + place) * states + n];
        qk += products[n];
      }
      let weighted = 0;
      let contribution = 0;
      for (let d = 0; d < channels; d++) {
        const step = dt.data[(at + place) * channels + d];
        const rate = (k * channels + d) * rates;
        let weight = 0;
        if (rates === 1) weight = qk * Math.exp(after[d] * A.data[rate]);
        else {
          for (let n = 0; n < states; n++) {
            weight += products[n] * Math.exp(after[d] * A.data[rate + n]);
          }
        }
        weighted += weight;
        contribution += weight * step;
        after[d] += step;
      }
      found.qk.each[k].data[place] = qk;
      found.weighted.each[k].data[place] = weighted / channels;
      found.contribution.each[k].data[place] = contribution / channels;
    }
  });
  for (const { each, sum } of Object.values(found)) {
    for (const { data } of each) data.forEach((value, i) => (sum.data[i] += value));
  }
  return found;
}

/** The positions of a path up to the query, from the query back to the first. */
function placesOf({ column_major: down, reverse, per_line: apart }, [row, column], height, width) {
  const [line, step, length] = down ? [column, row, height] : [row, column, width];
  // Where the query stands on the path; outputs of reversed lines on their own are not turned back.
  const begin = apart && reverse ? length - 1 - step : step;
  const place = (l, s) => (down ? s * width + l : l * width + s);
  const lines = down ? width : height;
  const found = [];
  const way = reverse ? 1 : -1;
  for (let l = line, s = begin; l >= 0 && l < lines; l += way, s = reverse ? 0 : length - 1) {
    for (; s >= 0 && s < length; s += way) found.push(place(l, s));
    if (apart) break;
  }
  return found;
}

/** A path's name, as mmvmamba/analysis/scan_patterns.py has it. */
export function nameOf({ column_major: down, reverse, per_line: apart }) {
  const line = down ? "column" : "row";
  return `${apart ? `every ${line}` : `${line}s`}${reverse ? ", reversed" : ""}`;
}

// In JupyterLab, the mouse on a row of the tree mask lights up that node's path in the draft tree beside it.
// It draws over plotly's own picture by the chart's own scales, so it needs no kernel and no further package: plotly's
// library is out of reach of a script in a notebook, and a `FigureWidget` is megabytes a chart and blank until trusted.
// mark: the id of an element in the chart's output; paint: the colour of the path.
(mark, paint) => {
  const area = document.getElementById(mark).closest(".jp-OutputArea") || document.body;
  const shape = (parent, kind, set) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const key in set) made.setAttribute(key, set[key]);
    parent.appendChild(made);
  };
  const attach = (chart) => {
    const parents = chart.layout.meta.parents, nodes = chart.data.find((trace) => trace.name === "nodes");
    const clear = () => {
      chart.querySelectorAll(".eagle-path").forEach((made) => made.remove());
      chart.querySelectorAll(".subplot.xy .scatterlayer").forEach((layer) => { layer.style.opacity = 1; });
    };
    const show = (node) => {
      clear();
      const path = [];
      for (let at = node; at >= 0; at = parents[at]) path.unshift(at);
      const full = chart._fullLayout;
      const left = chart.querySelector(".subplot.xy .scatterlayer").parentNode;
      const right = chart.querySelector(".subplot.x2y2 .heatmaplayer").parentNode;
      const spot = (n) => [full.xaxis.c2p(nodes.x[n]), full.yaxis.c2p(nodes.y[n])];
      chart.querySelectorAll(".subplot.xy .scatterlayer").forEach((layer) => { layer.style.opacity = 0.35; });
      shape(left, "polyline", {class: "eagle-path", "data-nodes": path.join(" "), points: path.map((n) => spot(n).join(",")).join(" "),
        fill: "none", stroke: paint, "stroke-width": 4, "stroke-linejoin": "round"});
      for (const n of path) shape(left, "circle", {class: "eagle-path", cx: spot(n)[0], cy: spot(n)[1], r: 6, fill: paint});
      for (const n of path) {
        const label = (nodes.text[n] || "").replace(/<[^>]*>/g, "");
        shape(left, "text", {class: "eagle-path", x: spot(n)[0] + 9, y: spot(n)[1] - 7, fill: paint,
          "font-size": 13, "font-weight": "bold"});
        left.lastChild.textContent = label;
      }
      const top = full.yaxis2.c2p(node - 0.5), below = full.yaxis2.c2p(node + 0.5);
      shape(right, "rect", {class: "eagle-path", x: 0, y: Math.min(top, below), width: full.xaxis2._length, height: Math.abs(below - top),
        fill: "none", stroke: paint, "stroke-width": 2});
    };
    chart.on("plotly_hover", (event) => {
      const point = event.points[0], type = point.data.type;
      if (type === "heatmap") show(point.y);
      else if (point.data.name === "nodes") show(point.pointNumber);
    });
    chart.on("plotly_unhover", clear);
  };
  let tries = 0;
  const timer = setInterval(() => {
    const chart = area.querySelector(".js-plotly-plot");
    const ready = chart && chart.on && chart._fullLayout && chart.layout.meta;
    if (ready || ++tries > 100) clearInterval(timer);
    if (ready) attach(chart);
  }, 100);
}

{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}

{{- define "kmap.name" -}}
{{- printf "%s-webhook" .Release.Name | trunc 55 | trimSuffix "-" -}}
{{- end -}}

{{- define "kmap.selector" -}}
app.kubernetes.io/name: kmap-webhook
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kmap.labels" -}}
{{ include "kmap.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "kmap.host" -}}
{{- printf "%s.%s.svc" (include "kmap.name" .) .Release.Namespace -}}
{{- end -}}

{{- /* Namespaces that are left alone, whatever they say. */ -}}
{{- define "kmap.excluded" -}}
- key: kubernetes.io/metadata.name
  operator: NotIn
  values:
  - {{ .Release.Namespace }}
  {{- range without .Values.excludedNamespaces .Release.Namespace }}
  - {{ . }}
  {{- end }}
{{- end -}}
